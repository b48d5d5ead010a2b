"""License strings as people write them, as SPDX: names, abbreviations, addresses and HTML.

Every word of a string must be in free_text.yaml, as a part of a name or as a word that says nothing of the license. One
other word, such as `not`, `except` or `research`, and the string has no expression. A version is never added. The time
grows linearly with the string.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, Generic, TypeVar

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
_LINK = re.compile(r"<[^<>]*?\bhref\s*=\s*[\"']?([^\"'\s<>]+)[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z!][^<>]*>", re.IGNORECASE)
_WORD = re.compile(
    r"(?:https?:)?//[^\s<>\"']+|(?:[a-z0-9-]+\.)+[a-z]{2,}/[^\s<>\"']*|\d+(?:[._-]\d+)*|[^\W\d_]+|\S", re.IGNORECASE
)
# Elements of Creative Commons that are written as one word, such as ccbyncsa.
_JOINED = re.compile(r"(cc)?(by)(nc)?(sa|nd)?")
_IGNORED = frozenset("-–—‐‑−_.:()[]{}<>\"'“”‘’´`«»™®・")
_OPERATORS = {"or": "OR", "and": "AND", "&": "AND", ",": ",", ";": ",", "/": ",", "|": ","}
# Matches the identifiers that GNU licenses had in earlier lists of SPDX.
_DEPRECATED = re.compile(r"\b([AL]?GPL-\d\.\d|GFDL-\d\.\d)(\+)?(?![\w.+-])")
Words = tuple[str, ...]
Value = TypeVar("Value")


class _Phrases(Generic[Value]):
    """Values by phrases, which are sequences of words."""

    def __init__(self, values: Iterable[tuple[str, Value]]) -> None:
        self._values = {words(phrase): value for phrase, value in values}
        self._longest = max(map(len, self._values))

    def at(self, tokens: Words, position: int) -> tuple[Value, int] | None:
        """Returns the value of the longest phrase at a position, and the position after it; None without one."""
        for end in range(min(position + self._longest, len(tokens)), position, -1):
            if tokens[position:end] in self._values:
                return self._values[tokens[position:end]], end
        return None


@dataclass(frozen=True)
class _Name:
    """The license of a name.

    Attributes:
        unversioned: Its expression if no version is stated.
        versions: {version: expression}.
        is_gnu: True if identifiers end in -only or -or-later.
    """

    unversioned: str
    versions: Mapping[str, str]
    is_gnu: bool = False

    def expression(self, version: str, later: bool) -> str | None:
        """Returns the expression of a version, with the later ones if `later`; None if there is no such version."""
        license = next((name for known, name in self.versions.items() if _shortest(known) == _shortest(version)), None)
        if license is None:
            return None
        if self.is_gnu:
            return f"{license}-{'or-later' if later else 'only'}"
        return f"{license}+" if later else license


def _shortest(version: str) -> str:
    return re.sub(r"(\.0)+$", "", version)


@dataclass(frozen=True)
class _Vocabulary:
    """free_text.yaml, by phrases."""

    names: _Phrases[_Name]
    prefixes: _Phrases[None]
    elements: _Phrases[str]
    editions: _Phrases[None]
    regions: _Phrases[str]
    before_version: _Phrases[None]
    fillers: _Phrases[None]
    addresses: Mapping[str, str]


@cache
def _vocabulary() -> _Vocabulary:
    content = (files(__package__) / "free_text.yaml").read_bytes()
    fields: dict[str, Any] = parse_yaml(content, "names of licenses")
    names: list[tuple[str, _Name]] = []
    for license, phrases in fields["licenses"].items():
        version = re.search(r"-(\d[\d.]*)$", license)
        entry = _Name(license, {version[1]: license} if version else {})
        names += [(phrase, entry) for phrase in phrases]
    renamed = fields["renamed"]
    for family, (phrases, numbers) in fields["versioned"].items():
        unversioned = renamed.get(f"{family}-unversioned", f"LicenseRef-{family}-unversioned")
        versions = {str(number): renamed.get(f"{family}-{number}", f"{family}-{number}") for number in numbers}
        entry = _Name(unversioned, versions, family in fields["gnu"])
        names += [(phrase, entry) for phrase in phrases]
    commons = fields["creative_commons"]
    return _Vocabulary(
        _Phrases(names),
        _Phrases((phrase, None) for phrase in commons["prefixes"]),
        _Phrases((phrase, element) for element, phrases in commons["elements"].items() for phrase in phrases),
        _Phrases((phrase, None) for phrase in commons["editions"]),
        _Phrases(
            (phrase, code)
            for code, countries in commons["regions"].items()
            for phrase in (code, *countries.split(" | "))
        ),
        _Phrases((phrase, None) for phrase in fields["before_version"]),
        _Phrases((phrase, None) for phrase in fields["fillers"]),
        fields["addresses"],
    )


def words(text: str) -> Words:
    """Returns the words, numbers, operators and addresses of a text, in lower case."""
    text = unicodedata.normalize("NFKC", html.unescape(text))
    text = _TAG.sub(" ", _LINK.sub(r" \1 ", text)).casefold()
    # R packages write `GPL (>= 2)`.
    text = re.sub(r">=\s*(\d[\d.]*)", r"\1+", OR_LATER.sub("+", " ".join(text.split())))
    tokens: list[str] = []
    for token in _WORD.findall(text):
        if joined := _JOINED.fullmatch(token):
            tokens += filter(None, joined.groups())
        elif "/" in token[:-1]:
            tokens.append(token.rstrip(".,;:)]}>"))
        elif token not in _IGNORED:
            tokens.append(re.sub(r"(?<=\d)[_-](?=\d)", ".", token).replace("licence", "license"))
    return tuple(tokens)


def current_spdx(text: str) -> str | None:
    """Returns an SPDX expression in the spelling of SPDX, with the names that GNU licenses have today; None if invalid."""
    try:
        expression = spdx(text)
    except (ValueError, RecursionError):
        return None
    return _DEPRECATED.sub(lambda match: f"{match[1]}-{'or-later' if match[2] else 'only'}", expression)


def expression_of(text: str) -> str | None:
    """Returns the SPDX expression of a license string; None unless all of it is understood.

    Licenses joined by `or` are alternatives, and so are those of a `dual` license. All others apply together, also
    where a slash or a comma is between them, which people use for both. Alternatives of which one forbids commercial
    use or derived works have no expression unless they are SPDX: such words are often about the parts of a collection.
    """
    if len(text) > LONGEST:
        return None
    expression = current_spdx(text)
    # Operators of SPDX have upper case; with others the words are no expression of somebody who knows SPDX.
    if expression and " OR " in expression and " OR " not in text and RESTRICTED.search(expression):
        return None
    expression = expression or _Statement(words(text)).expression()
    parts = [part for part in re.split(r"[,;|]", text) if part.strip()]
    if expression is None and len(parts) > 1:
        expressions = [current_spdx(part) or _Statement(words(part)).expression() for part in parts]
        return all_of(set(expressions))
    return expression and spdx(expression)


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
    if (license := addresses.expression_of(absolute)) is not None:
        return license
    place = addresses.place_of(absolute)
    start = max((start for start in _vocabulary().addresses if place.startswith(start)), key=len, default=None)
    if start is None:
        return None
    text, rest = _vocabulary().addresses[start], place[len(start) :]
    # Without slashes, the rest holds no address.
    return (current_spdx(rest) if not text else None) or _Statement(
        words(f"{text} {rest.replace('/', ' ')}")
    ).expression()


@dataclass
class _Statement:
    """A string in words, and the licenses in it so far.

    Attributes:
        tokens: The words.
        licenses: (expression, operator between it and the one before it; "" without one).
        bare: Elements of Creative Commons that stand beside a license, such as `(Attribution)`.
    """

    tokens: Words
    licenses: list[tuple[str, str]] = field(default_factory=list)
    bare: set[str] = field(default_factory=set)

    def expression(self) -> str | None:
        position, operators = 0, set[str]()
        while position < len(self.tokens):
            token = self.tokens[position]
            if "/" in token[:-1]:
                found: tuple[str | None, int] | None = (_at_address(token), position + 1)
            else:
                found = self._named(position) or self._creative_commons(position)
            if found is not None:
                license, position = found
                if license is None:
                    return None
                if license:
                    self.licenses.append((license, _strongest(operators)))
                    operators = set()
            elif filler := _vocabulary().fillers.at(self.tokens, position):
                position = filler[1]
            elif token in _OPERATORS:
                operators.add(_OPERATORS[token])
                position += 1
            else:
                return None
        return None if operators - {","} else self._joined()

    def _named(self, position: int) -> tuple[str | None, int] | None:
        """Returns the expression of the name at a position, and the position after it; None without a name."""
        match = _vocabulary().names.at(self.tokens, position)
        if match is None:
            return None
        name, position = match
        version, after = self._version(position)
        scope = self.tokens[after : after + 1]
        license = name.expression(version, scope == ("+",)) if version else None
        if license is None:
            # The number is no version of it; perhaps it begins the next name, such as `3-clause BSD`.
            return name.unversioned, position
        return license, after + (scope == ("+",) or (name.is_gnu and scope == ("only",)))

    def _creative_commons(self, position: int) -> tuple[str | None, int] | None:
        """Returns the expression of the elements at a position, and the position after them; None without elements.

        "" stands for a name of Creative Commons without elements, or for elements without that name.
        """
        vocabulary, start = _vocabulary(), position
        if prefix := vocabulary.prefixes.at(self.tokens, position):
            position = prefix[1]
        elements, position = self._elements(position)
        # `by` alone is an English word.
        if not prefix and (not elements or self.tokens[start] == "by"):
            return None
        if not elements:
            self.bare.add("CC-")
            return "", position
        kind = "-".join(element for element in ("BY", "NC", "ND", "SA") if element in elements)
        if "BY" not in elements or {"ND", "SA"} <= elements:
            return None, position
        version, after = self._version(position)
        if version is None:
            if prefix:
                return addresses.creative_commons(kind, None), position
            self.bare.add(f"CC-{kind}-")
            return "", position
        edition = vocabulary.editions.at(self.tokens, after)
        region = vocabulary.regions.at(self.tokens, edition[1] if edition else after)
        number = f"{version}.0" if "." not in version else version
        if number not in addresses.VERSIONS or not (prefix or edition or region):
            return None, position
        end = (region or edition or (None, after))[1]
        return addresses.creative_commons(kind, number, region[0] if region else None), end

    def _elements(self, position: int) -> tuple[set[str], int]:
        """Returns the elements of Creative Commons at a position, and the position after them."""
        elements, vocabulary, following = set[str](), _vocabulary(), position
        while following < len(self.tokens):
            if element := vocabulary.elements.at(self.tokens, following):
                elements.add(element[0])
                following = position = element[1]
            elif skipped := vocabulary.before_version.at(self.tokens, following):
                following = skipped[1]
            elif elements and self.tokens[following] in ("and", "&"):
                following += 1
            else:
                break
        return elements, position

    def _version(self, position: int) -> tuple[str | None, int]:
        """Returns the version at a position, and the position after it; None without one."""
        after = position
        while skipped := _vocabulary().before_version.at(self.tokens, after):
            after = skipped[1]
        if after < len(self.tokens) and self.tokens[after][0].isdigit():
            return self.tokens[after], after + 1
        return None, position

    def _joined(self) -> str | None:
        """Returns the expression of all licenses. A name without a version stands for the same one with its version."""
        stated = [license for license, _ in self.licenses]
        if not all(any(start in license for license in stated) for start in self.bare):
            return None
        exact = {license: _most_exact(license, stated) for license in stated}
        operators = {
            operator
            for (previous, _), (license, operator) in pairwise(self.licenses)
            if exact[previous] != exact[license]
        }
        distinct = list(dict.fromkeys(map(exact.__getitem__, stated)))
        if not distinct or "" in operators or {"OR", "AND"} <= operators:
            return None
        if "OR" in operators or (operators and {"dual", "either"} & set(self.tokens)):
            return None if any(map(RESTRICTED.search, distinct)) else " OR ".join(sorted(distinct, key=str.lower))
        return " AND ".join(sorted(distinct, key=str.lower))


def _strongest(operators: set[str]) -> str:
    """Returns what several operators in a row mean: `and/or` is `and`."""
    return next((operator for operator in ("AND", "OR", ",") if operator in operators), "")


def _most_exact(license: str, stated: Sequence[str]) -> str:
    """Returns the one license of a string that says more than this one, or this one."""
    if license == PUBLIC_DOMAIN:
        return next((dedication for dedication in DEDICATIONS if dedication in stated), license)
    family = license.removeprefix("LicenseRef-").removesuffix("-unversioned")
    versions = {other for other in stated if re.match(rf"(LicenseRef-)?{re.escape(family)}-\d", other)}
    is_unversioned = license in (f"LicenseRef-{family}-unversioned", "LicenseRef-GFDL")
    return versions.pop() if is_unversioned and len(versions) == 1 else license
