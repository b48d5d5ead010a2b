"""The license that a text states about itself: in the header of a source file, or in the footer of a page.

A header with terms that no rule knows gives no license: a wrong hit loses a document, and a miss would publish it under
a license that it does not have. The time is linear in the part of a text that is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from pipeline.core.yaml_text import parse_yaml
from stages.data.acquire.licenses import free_text

# Characters at the beginning of a source file that are its header, and at the end of a page that are its footer.
HEADER = 6000
FOOTER = 800
# Characters of a notice before and after the first words of its terms.
BEFORE, AFTER = 1000, 3000
# Between two words of a comment.
_GAP = r"[\s#*/;%-]+"
# Words with which a file states license terms of its own.
TERMS = re.compile(
    rf"permission{_GAP}(?:is|to{_GAP}(?:use|copy))|redistribut|SPDX-License-Identifier|licen[sc]ed{_GAP}under"
    rf"|public{_GAP}domain|@licen[sc]e\b|general{_GAP}public{_GAP}license|mozilla{_GAP}public{_GAP}license"
    rf"|boost{_GAP}software{_GAP}license|creativecommons\.org/licen|(?:released|distributed){_GAP}under{_GAP}the{_GAP}"
    rf"|commons{_GAP}clause|business{_GAP}source{_GAP}license",
    re.IGNORECASE,
)
RESERVED = re.compile(rf"all{_GAP}rights{_GAP}reserved", re.IGNORECASE)
# What stands before the name of a license. The Apache license calls itself `the License`.
_UNDER = re.compile(
    r"(?:licen[sc]ed|released|distributed)\sunder\s(?!the\s(?:licen[sc]e|terms)\b)(?:the\s|an?\s)?"
    r"|(?:under|subject\sto)\sthe\sterms\sof\s(?:the\s|an?\s)?(?!licen[sc]e\b)|@licen[sc]e:?\s|spdx-license-identifier:\s?"
)
_COMMONS = re.compile(r"(?:https?:)?//[\w.]*creativecommons\.org/licen[^\s\"'<>()]+[^\s\"'<>().,;:]")
# Words between the name of a GNU license and its version.
_FOUNDATION = re.compile(
    r",?\sas\spublished\sby\sthe\sfree\ssoftware\sfoundation[,;:]?(?:\seither)?|\sof\sthe\slicense\b,?"
)
_SENTENCE_END = re.compile(r"(?<!\bv)\.(?:\s|$)|;|,? which |,? that |,? you may |,? see | \(see ")
# A file that points to the license of its repository.
_REFERS = re.compile(r"(?:found in|see|in) (?:the )?\W*(?:license|copying)\b[\w.]*\W* (?:file|in|for)")
# Words of terms that are not open.
_RESTRICTED = re.compile(
    r"non-?commercial|no derivativ|(?:academic|research|educational|personal|evaluation|internal) (?:use|purposes)|"
    r"confidential|proprietary|commons clause|business source license|\bby[_-]n[cd]\b|\bcc[ _-]?by[ _-]?n[cd]\b"
)
_MARKS = re.compile(r"^[ \t\r#*/;%!\"'<>-]*(?:(?:rem|dnl|\.\.) )?|[ \t\r#*/]+$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Notice:
    """A license that a text states about itself.

    Attributes:
        stated: The line with the terms.
        license: SPDX; None if no rule knows the terms.
    """

    stated: str
    license: str | None


def in_header(text: str, granted: re.Pattern[str] | None = None, within: int = HEADER) -> Notice | None:
    """Returns the notice in the header of a source file; None if it states no terms.

    A copyright notice without terms is none, but `All rights reserved` is, unless the header points to the license of
    the repository.

    Args:
        text: The file.
        granted: Matches a file of which `All rights reserved` is no term, since its source may license it.
        within: The number of characters at the beginning that are read.
    """
    header = text[:within]
    matches = list(TERMS.finditer(header))
    if not matches and (granted is None or granted.search(text) is None):
        matches = list(RESERVED.finditer(header))[:1]
    if not matches:
        return None
    licenses, read = set[str | None](), 0
    for match in matches:
        # Terms close together are one notice.
        if match.start() >= read:
            read = match.start() + AFTER
            licenses.add(_license_of(header[max(0, match.start() - BEFORE) : read]))
    license, plain = free_text.all_of(licenses), " ".join(_plain(header).split())
    if license is None and granted is None and _REFERS.search(plain) and not _RESTRICTED.search(plain):
        return None
    return Notice(_line(header, matches[0]), license)


def in_footer(text: str) -> Notice | None:
    """Returns the notice at the end of a page's text; None if it states no license, and does not reserve all rights."""
    footer = text[-FOOTER:]
    reserved = RESERVED.search(footer)
    match = reserved or re.search(r"licen[sc]ed\s+under|creative\s*commons", footer, re.IGNORECASE)
    if match is None:
        return None
    # Beside reserved rights, a license is that of a part, such as of the icons.
    license = None if reserved else _license_of(footer)
    is_term = license is not None or reserved or _RESTRICTED.search(_plain(footer))
    return Notice(_line(footer, match), license) if is_term else None


def _line(text: str, match: re.Match[str]) -> str:
    # A page may be one line.
    start, end = max(text.rfind("\n", 0, match.start()) + 1, match.start() - 100), text.find("\n", match.end())
    return text[start : end if end >= 0 else None].strip("# \t\r")


def _plain(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in _MARKS.sub("", text.casefold()).splitlines())


def _license_of(text: str) -> str | None:
    """Returns the expression of all notices in a text; None if one is unknown, or if other words restrict it."""
    lines = _FOUNDATION.sub("", _plain(text))
    plain = " ".join(lines.split())
    found: set[str | None] = {license for license, rule in _rules().items() if _holds(rule, plain)}
    for match in _UNDER.finditer(lines):
        found.add(_named(lines[match.end() : match.end() + 200]))
    found |= set(map(free_text.expression_of, _COMMONS.findall(lines)))
    known = [each for each in found if each]
    license = free_text.all_of({each and free_text.most_exact(each, known) for each in found}) if found else None
    is_restricted = _RESTRICTED.search(plain.replace("commercial or non-commercial", ""))
    return license if license and (not is_restricted or free_text.RESTRICTED.search(license)) else None


def _named(text: str) -> str | None:
    """Returns the license whose name is the sentence with which a text begins, or its first line."""
    sentence = _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0]
    line = _SENTENCE_END.split(text.partition("\n")[0], maxsplit=1)[0]
    return free_text.expression_of(sentence) or free_text.expression_of(line)


def is_expat(text: str) -> bool:
    """Returns True for a text that holds the beginning of the license that SPDX calls MIT."""
    return bool(re.search(_rules()["MIT"]["text"][0], " ".join(text[:20_000].casefold().split())))


@cache
def _rules() -> dict[str, dict[str, list[str]]]:
    rules: dict[str, dict[str, list[str]]] = parse_yaml(
        (files(__package__) / "notices.yaml").read_bytes(), "license notices"
    )
    return rules


def _holds(rule: dict[str, list[str]], plain: str) -> bool:
    found = [re.search(pattern, plain) for pattern in rule.get("without", ())]
    return all(re.search(pattern, plain) for pattern in rule["text"]) and not any(found)
