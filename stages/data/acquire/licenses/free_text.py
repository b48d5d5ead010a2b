"""License strings as people write them, as SPDX: names, abbreviations, addresses and HTML.

Every word of a string must be in free_text.yaml, as a part of a name or as a word that says nothing of the license. One
other word, such as `not`, `except` or `research`, and the string has no expression. A version is never added. The time
grows linearly with the string.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from pipeline.core.bounds import spdx
from pipeline.core.yaml_text import parse_yaml
from stages.data.acquire.licenses import addresses

# Characters of a string that is read.
LONGEST = 2000
# Other spellings of `+`.
OR_LATER = re.compile(
    r"\+?[ -]or[ -](?:\(at your option\) )?(?:any[ -])?(?:later|newer)(?:[ -]versions?)?\b", re.IGNORECASE
)
PUBLIC_DOMAIN = "LicenseRef-Public-Domain"
# More exact statements than PUBLIC_DOMAIN.
DEDICATIONS = ("CC0-1.0", "CC-PDM-1.0", "CC-PDDC", "PDDL-1.0", "Unlicense", "LicenseRef-Public-Domain-US")
# Matches identifiers of licenses that forbid commercial use or derived works.
RESTRICTED = re.compile(r"-N[CD]\b")
_SHARE_ALIKE = re.compile(r"-SA\b|GFDL")
# Matches the identifiers that GNU licenses had in earlier lists of SPDX.
_DEPRECATED = re.compile(r"\b([AL]?GPL-\d\.\d|GFDL-\d\.\d)(\+)?(?![\w.+-])")
# A link in angle brackets, as in Markdown.
_LINK = re.compile(r"<(https?://[^\"'\s<>]+)>", re.IGNORECASE)
# An element: its name, and its attributes.
_ELEMENT = re.compile(r"</?([a-z][\w.:-]*)([^<>]*)>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"([\w.:-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\"'\s<>]+))")
# Of HTML and JATS. Other words in angle brackets may be part of a license.
_TAGS = """
a b bold br div em ext-link font i img italic li license-p p small span strong sub sup u ul uri
"""
TAGS = frozenset(_TAGS.split())
_LAYOUT = """
align border class color dir ext-link-type face height id lang property rel rev role size style target type typeof
width xlink:type xml:lang
"""
# Attributes whose values say nothing of a license. The others do, such as title and alt.
LAYOUT = frozenset(_LAYOUT.split())
# A letter after a number is part of it: `OGL 1.0a` is no version of the Open Government Licence.
_WORD = re.compile(
    r"(?:https?:)?//[^\s<>\"']+|(?:[a-z0-9-]+\.)+[a-z]{2,}/[^\s<>\"']*|\d+(?:[._-]\d+)*(?:[a-z]\b)?|[^\W\d_]+|\S"
)
# Elements of Creative Commons that are written as one word, such as ccbyncsa.
_JOINED = re.compile(r"(cc)?(by)(nc)?(sa|nd)?")
_IGNORED = frozenset("-–—‐‑−_.:()[]{}\"'“”‘’´`«»™®・")
_OPERATORS = {"or": "OR", "and": "AND", "&": "AND", ",": ",", ";": "AND", "/": "AND", "|": "AND"}
Words = tuple[str, ...]
# A value, and the position after the words that have it.
Match = tuple[Any, int]


class _Phrases:
    """Values by phrases."""

    def __init__(self, values: Iterable[tuple[str, Any]]) -> None:
        self._values = {words(phrase): value for phrase, value in values}
        self._longest = max(map(len, self._values))

    def at(self, tokens: Words, position: int) -> Match | None:
        """Returns the value of the longest phrase at a position; None without one."""
        ends = range(min(position + self._longest, len(tokens)), position, -1)
        return next(((self._values[tokens[position:n]], n) for n in ends if tokens[position:n] in self._values), None)


@cache
def _vocabulary() -> dict[str, Any]:
    """Returns the phrases of free_text.yaml. Those of names have {version, "" if it is not stated: expression}."""
    fields: dict[str, Any] = parse_yaml((files(__package__) / "free_text.yaml").read_bytes(), "names of licenses")
    names, renamed, commons = [], fields["renamed"], fields["creative_commons"]
    for license, phrases in fields["licenses"].items():
        number = re.search(r"-(\d[\d.]*)$", license)
        names += [(phrase, {"": license} | ({_short(number[1]): license} if number else {})) for phrase in phrases]
    for family, (phrases, versions) in fields["versioned"].items():
        exact, later = ("-only", "-or-later") if family in fields["gnu"] else ("", "+")
        licenses = {"": renamed.get(f"{family}-unversioned", f"LicenseRef-{family}-unversioned")}
        for version in map(str, versions):
            license = renamed.get(f"{family}-{version}", f"{family}-{version}")
            licenses |= {_short(version): license + exact, f"{_short(version)}+": license + later}
        names += [(phrase, licenses) for phrase in phrases]
    regions = [(name, code) for code, text in commons["regions"].items() for name in (code, *text.split(" | "))]
    elements = [(phrase, element) for element, phrases in commons["elements"].items() for phrase in phrases]
    plain = {name: fields[name] for name in ("before_version", "fillers")}
    plain |= {name: commons[name] for name in ("prefixes", "editions")}
    phrases = {name: _Phrases((phrase, None) for phrase in listed) for name, listed in plain.items()}
    phrases |= {"names": _Phrases(names), "regions": _Phrases(regions), "elements": _Phrases(elements)}
    return {**phrases, "addresses": fields["addresses"]}


def _short(version: str) -> str:
    return re.sub(r"(\.0)+$", "", version)


def words(text: str) -> Words:
    """Returns the words, numbers, operators and addresses of a text, in lower case."""
    text = unicodedata.normalize("NFKC", html.unescape(text))
    text = " ".join(_ELEMENT.sub(_stated_by, _LINK.sub(r" \1 ", text)).casefold().split())
    text = re.sub(r"(?:,| \() ?(?=or )", " ", text)
    # R packages write `GPL (>= 2)`; `only` says no more than the version before it.
    text = re.sub(r"(?<=\d)[ -]only\b", "", re.sub(r">=\s*(\d[\d.]*)", r"\1+", OR_LATER.sub("+", text)))
    tokens: list[str] = []
    for token in _WORD.findall(text):
        if joined := _JOINED.fullmatch(token):
            tokens += filter(None, joined.groups())
        elif "/" in token[:-1]:
            tokens.append(token.rstrip(".,;:)]}>"))
        elif token not in _IGNORED:
            tokens.append(re.sub(r"(?<=\d)[_-](?=\d)", ".", token).replace("licence", "license"))
    return tuple(tokens)


def _stated_by(element: re.Match[str]) -> str:
    """Returns what the attributes of an element say; all of an element that neither is known nor has a link."""
    values = [(name.casefold(), "".join(texts)) for name, *texts in _ATTRIBUTE.findall(element[2])]
    if element[1].casefold() not in TAGS and not any(name.endswith("href") for name, _ in values):
        return element[0]
    stated = [text for name, text in values if name not in LAYOUT and not name.startswith("xmlns")]
    # What is no attribute is read as well, so that no word of it is lost.
    return f" {' '.join(stated)} {_ATTRIBUTE.sub('', element[2]).strip().rstrip('/')} "


def restrictions(text: str) -> set[str]:
    """Returns those of NC and ND that a text speaks of in the words of Creative Commons."""
    tokens, elements = words(text[:LONGEST]), _vocabulary()["elements"]
    found = set[str]()
    for position, token in enumerate(tokens):
        # Two letters alone may be of another word, such as `2nd`.
        if len(token) > 2 or set(tokens[max(position - 1, 0) : position]) & {"by", "cc", "nc", "sa"}:
            match = elements.at(tokens, position)
            found |= {match[0]} if match else set()
    return found & {"NC", "ND"}


def stated_spdx(text: str) -> str | None:
    """Returns an SPDX expression of a source in the spelling of SPDX; None if it is none, or has a LicenseRef.

    What such a name means is known of the names that this project or a map gives alone: a recipe that allows one of
    these would else allow whatever a row calls by it.
    """
    try:
        expression = spdx(text)
    except (ValueError, RecursionError):
        return None
    return None if "LicenseRef-" in expression else expression


def current_spdx(text: str) -> str | None:
    """Returns an SPDX expression of a source with today's names of GNU licenses; None as `stated_spdx`."""
    expression = stated_spdx(text)
    return expression and _DEPRECATED.sub(lambda match: f"{match[1]}-{'or-later' if match[2] else 'only'}", expression)


def expression_of(text: str) -> str | None:
    """Returns the SPDX expression of a license string; None unless all of it is understood.

    Licenses joined by `or` are alternatives, and so are those of a `dual` license. All others apply together, also
    where a slash or a comma is between them, which people use for both. Alternatives that `_are_a_choice` rejects have
    no expression unless they are SPDX.
    """
    if len(text) > LONGEST:
        return None
    expression = _one(text)
    parts = [part for part in re.split(r"[,;|]", text) if part.strip()]
    return expression if expression or len(parts) < 2 else all_of(set(map(_one, parts)))


def _one(text: str) -> str | None:
    expression = current_spdx(text) or _Statement(words(text)).expression()
    # The operators of SPDX have upper case; others are not those of somebody who writes SPDX.
    if expression and " OR " in expression and " OR " not in text and not _are_a_choice(expression.split(" OR ")):
        return None
    return expression and spdx(expression)


def _are_a_choice(alternatives: Sequence[str]) -> bool:
    """Returns False for alternatives that are often those of the parts of a collection.

    These are alternatives of which one forbids commercial use or derived works, or of which some are share-alike
    licenses of texts and others are not, such as `CC BY or CC BY-SA`.
    """
    share_alike = {_SHARE_ALIKE.search(license) is not None for license in alternatives}
    return len(share_alike) == 1 and not any(map(RESTRICTED.search, alternatives))


def all_of(expressions: set[str | None]) -> str | None:
    """Returns the expression of licenses that all apply; None if one of them is None."""
    known = [expression for expression in expressions if expression is not None]
    if len(known) < len(expressions):
        return None
    if len(known) == 1:
        return known[0]
    return spdx(" AND ".join(f"({license})" if " " in license else license for license in sorted(known, key=str.lower)))


def _at_address(address: str) -> str | None:
    absolute = address if "//" in address else f"//{address}"
    place, texts = addresses.place_of(absolute), _vocabulary()["addresses"]
    start = max((start for start in texts if place.startswith(start)), key=len, default=None)
    if start is None:
        return addresses.expression_of(absolute)
    # Without slashes, the rest holds no address.
    rest = f"{texts[start]} {place[len(start) :].replace('/', ' ')}".strip()
    return current_spdx(rest) or _Statement(words(rest)).expression()


class _Statement:
    """A string in words, and the licenses in it so far.

    Attributes:
        tokens: The words.
        licenses: (expression, operator between it and the one before it; "" without one).
        bare: Beginnings of licenses of which one must be stated, for `Creative Commons` or `(Attribution)` beside it.
    """

    def __init__(self, tokens: Words) -> None:
        self.tokens, self.phrases = tokens, _vocabulary()
        self.licenses: list[tuple[str, str]] = []
        self.bare: set[str] = set()

    def expression(self) -> str | None:
        position, operators = 0, set[str]()
        while position < len(self.tokens):
            token = self.tokens[position]
            is_address = "/" in token[:-1]
            found = (_at_address(token), position + 1) if is_address else self._license(position)
            if found is not None:
                license, position = found
                if license is None:
                    return None
                if license:
                    # `and/or` is `and`.
                    operator = next((each for each in ("AND", "OR", ",") if each in operators), "")
                    self.licenses.append((license, operator))
                    operators = set()
            elif filler := self._at("fillers", position):
                position = filler[1]
            elif token in _OPERATORS:
                operators.add(_OPERATORS[token])
                position += 1
            else:
                return None
        return None if "OR" in operators else self._joined()

    def _at(self, kind: str, position: int) -> Match | None:
        match: Match | None = self.phrases[kind].at(self.tokens, position)
        return match

    def _license(self, position: int) -> Match | None:
        """Returns the expression of the license at a position, None if there is no such license; None without one."""
        if match := self._at("names", position):
            name, position = match
            version, after = self._version(position)
            # A number that is no version of it may begin the next name, such as `3-clause BSD`.
            return (name[version], after) if version in name else (name[""], position)
        return self._creative_commons(position)

    def _creative_commons(self, start: int) -> Match | None:
        prefix = self._at("prefixes", start)
        elements, position = self._elements(prefix[1] if prefix else start)
        # `by` alone is an English word.
        if not prefix and (not elements or self.tokens[start] == "by"):
            return None
        kind = "-".join(element for element in ("BY", "NC", "ND", "SA") if element in elements)
        version, after = self._version(position)
        edition = self._at("editions", after)
        region = self._at("regions", edition[1] if edition else after)
        if not elements or (version == "" and not prefix):
            self.bare.add(f"CC-{kind}-" if kind else "CC-")
            return "", position
        if (
            not kind.startswith("BY")
            or {"ND", "SA"} <= elements
            or not (prefix or edition or region or len(elements) > 1)
        ):
            return None, position
        if version == "":
            return addresses.creative_commons(kind, None), position
        number = next((known for known in addresses.VERSIONS if _short(known) == version), None)
        end = (region or edition or (None, after))[1]
        return number and addresses.creative_commons(kind, number, region[0] if region else None), end

    def _elements(self, position: int) -> tuple[set[str], int]:
        """Returns the elements of Creative Commons at a position, and the position after them."""
        elements, following = set[str](), position
        while following < len(self.tokens):
            if element := self._at("elements", following):
                elements.add(element[0])
                following = position = element[1]
            elif skipped := self._at("before_version", following):
                following = skipped[1]
            elif elements and self.tokens[following] in ("and", "&"):
                following += 1
            else:
                break
        return elements, position

    def _version(self, position: int) -> tuple[str, int]:
        """Returns the version at a position, with `+` for later ones, and the position after it; "" without one."""
        after = position
        while skipped := self._at("before_version", after):
            after = skipped[1]
        if after == len(self.tokens) or not self.tokens[after][0].isdigit():
            return "", position
        later = self.tokens[after + 1 : after + 2] == ("+",)
        return _short(self.tokens[after]) + "+" * later, after + 1 + later

    def _joined(self) -> str | None:
        """Returns the expression of all licenses. A name without a version stands for the same one with its version."""
        stated = [license for license, _ in self.licenses]
        if not all(any(start in license for license in stated) for start in self.bare):
            return None
        exact = {license: most_exact(license, stated) for license in stated}
        pairs = pairwise((exact[license], operator) for license, operator in self.licenses)
        operators = {operator for (previous, _), (license, operator) in pairs if previous != license}
        distinct = sorted(set(exact.values()), key=str.lower)
        if not distinct or "" in operators or {"OR", "AND"} <= operators:
            return None
        if "OR" not in operators and not (operators and {"dual", "either"} & set(self.tokens)):
            return " AND ".join(distinct)
        return " OR ".join(distinct) if _are_a_choice(distinct) else None


def most_exact(license: str, stated: Sequence[str]) -> str:
    """Returns the one license of a string that says more than this one, or this one."""
    if license == PUBLIC_DOMAIN:
        return next((dedication for dedication in DEDICATIONS if dedication in stated), license)
    family = license.removeprefix("LicenseRef-").removesuffix("-unversioned")
    versions = {other for other in stated if re.match(rf"(LicenseRef-)?{re.escape(family)}-\d", other)}
    is_unversioned = license in (f"LicenseRef-{family}-unversioned", "LicenseRef-GFDL")
    return versions.pop() if is_unversioned and len(versions) == 1 else license
