"""The license that a text states about itself: in the header of a source file, or in the footer of a page.

A header with terms that no rule knows gives no license: a wrong hit loses a document, and a miss would publish it under
a license that it does not have. The time is linear in the part of a text that is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    rf"|boost{_GAP}software{_GAP}license|(?:released|distributed){_GAP}under{_GAP}the{_GAP}",
    re.IGNORECASE,
)
RESERVED = re.compile(rf"all{_GAP}rights{_GAP}reserved", re.IGNORECASE)
# The beginning of the text that SPDX calls MIT.
EXPAT = re.compile(
    r"permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    r"documentation files \(the \W*software\W*\), to deal in the software without restriction, including without "
    r"limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the "
    r"software, and to permit persons to whom the software is furnished to do so, subject to the following conditions: "
    r"the above copyright notice and this permission notice shall be included in all copies or substantial portions of "
    r"the software\. the software is provided \W*as is"
)
_BSD = r"redistribution and use in source and binary forms, with or without modification, are permitted provided that "
_GRANT = r"permission to use, copy, modify,?(?: and| and/or)? distribute this (?:python )?software"
_HPND = (
    rf"{_GRANT} and its (?:associated )?documentation for any purpose (?:and )?without fee is hereby granted, provided "
    r"that the above copyright notice appears? in all copies,?(?: and)? that both that copyright notice and this "
    r"permission notice appear in supporting documentation"
)
_CMU = r"by obtaining, using,? and/or copying this software and/or its associated documentation, you agree that you have"
_ENDORSE = r"neither the names? of|names? .{1,200}?(?:may|must) not be used to endorse"
# {license: patterns of a notice that must all match, or must not where a `!` stands before it}. Notices are in lower
# case, without marks of comments, and with single spaces.
_RULES = {
    "MIT": (EXPAT.pattern, "!except as contained in this notice"),
    "X11": (EXPAT.pattern, "except as contained in this notice"),
    "BSD-2-Clause": (_BSD, f"!{_ENDORSE}", "!advertising"),
    "BSD-3-Clause": (_BSD, _ENDORSE, "!advertising"),
    "BSD-4-Clause": (_BSD, _ENDORSE, "all advertising materials"),
    "Zlib": (
        r"permission is granted to anyone to use this software for any purpose, including commercial applications, and "
        r"to alter it and redistribute it freely, subject to the following restrictions",
    ),
    "ISC": (
        rf"{_GRANT} for any purpose with or without fee is hereby granted, provided that the above copyright notice and "
        r"this permission notice appear in all copies",
    ),
    "0BSD": (rf"{_GRANT} for any purpose with or without fee is hereby granted\.",),
    "HPND": (_HPND, f"!{_CMU}"),
    "MIT-CMU": (_CMU, _HPND),
    "Apache-2.0": (r"licen[sc]ed under the apache license,? version 2\.0", "!llvm exceptions"),
    "Apache-2.0 WITH LLVM-exception": (r"under the apache license v2\.0 with llvm exceptions",),
    "MPL-1.1": (r"subject to the mozilla public license version 1\.1",),
    "MPL-2.0": (r"subject to the terms of the mozilla public license, v(?:\.|ersion) ?2\.0",),
    "BSL-1.0": (r"distributed under the boost software license,? version 1\.0",),
    "CC0-1.0": (r"dedicated all copyright and related and neighboring rights to this \w+ to the public domain",),
    "Unlicense": (r"this is free and unencumbered software released into the public domain",),
    free_text.PUBLIC_DOMAIN: (
        r"(?:this (?:file|code|module|software|program|work|script|library|source(?: code)?|header) is(?: hereby)?|"
        r"(?:released|placed|put|dedicated|donated)) (?:in|into|to) the public domain",
        r"!free and unencumbered software",
        r"!and neighboring rights",
        r"!\bnot (?:in|released|placed|put|dedicated|donated)",
    ),
}
_GNU = re.compile(
    r"gnu (affero |lesser |library )?general public license(?:,? ?\(\w+\))?,?(?: (?:version|v\.?) ?(\d(?:\.\d)?)(?: only)?)?"
    r"(?: of the license)?,? as published by the free software foundation(?:[,;:]? (?:either )?version (\d(?:\.\d)?)"
    r"(?: of the license)?(,? or,? ?\(?(?:at your option)?\)?,? any later version)?)?"
)
# What stands before the name of a license. The Apache license calls itself `the License`.
_UNDER = re.compile(
    r"(?:(?:licen[sc]ed|released|distributed)\sunder\s(?!the\slicen[sc]e\b)(?:the\s)?(?:terms\sof\s(?:the\s)?)?|@licen[sc]e:?\s|"
    r"spdx-license-identifier:\s?)"
)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|;|,? which |,? that |,? you may |,? see | \(see ")
# Words of terms that are not open.
_RESTRICTED = re.compile(
    r"non-?commercial|no derivativ|(?:academic|research|educational|personal|evaluation|internal) (?:use|purposes)|"
    r"confidential|proprietary"
)
_MARKS = re.compile(r"^[\s#*/;%!\"'<>-]*(?:(?:rem|dnl|\.\.) )?|[\s#*/]+$", re.MULTILINE)


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

    A copyright notice without terms is none, but `All rights reserved` is.

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
    return Notice(_line(header, matches[0]), free_text.all_of(licenses))


def in_footer(text: str) -> Notice | None:
    """Returns the notice at the end of a page's text; None if it states no license, and does not reserve all rights."""
    footer = text[-FOOTER:]
    match = RESERVED.search(footer) or re.search(r"licen[sc]ed\s+under|creative\s*commons", footer, re.IGNORECASE)
    if match is None:
        return None
    license = _license_of(footer)
    is_term = license is not None or RESERVED.search(footer) or _RESTRICTED.search(_plain(footer))
    return Notice(_line(footer, match), license) if is_term else None


def _line(text: str, match: re.Match[str]) -> str:
    start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
    return text[start : end if end >= 0 else None].strip("# \t\r")


def _plain(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in _MARKS.sub("", text.casefold()).splitlines())


def _license_of(text: str) -> str | None:
    """Returns the expression of all notices in a text; None if one of them is unknown, or if it is restricted."""
    lines = _plain(text)
    plain = " ".join(lines.split())
    if _RESTRICTED.search(plain.replace("commercial or non-commercial", "")):
        return None
    found: set[str | None] = {license for license, patterns in _RULES.items() if _holds(patterns, plain)}
    for kind, version, either, later in _GNU.findall(plain):
        name = {"affero": "AGPL", "lesser": "LGPL", "library": "LGPL"}.get(kind.strip(), "GPL")
        number = version or either
        written = f"{name}-{number if '.' in number else f'{number}.0'}-{'or-later' if later else 'only'}"
        found.add(free_text.current_spdx(written) if number else None)
    for match in _UNDER.finditer(lines):
        found.add(_named(lines[match.end() : match.end() + 200]))
    return free_text.all_of(found) if found else None


def _named(text: str) -> str | None:
    """Returns the license whose name is the sentence with which a text begins, or its first line."""
    sentence = _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0]
    line = _SENTENCE_END.split(text.partition("\n")[0], maxsplit=1)[0]
    return free_text.expression_of(sentence) or free_text.expression_of(line)


def _holds(patterns: tuple[str, ...], plain: str) -> bool:
    return all((re.search(each.lstrip("!"), plain) is None) == each.startswith("!") for each in patterns)
