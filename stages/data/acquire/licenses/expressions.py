"""SPDX expressions: from the license strings of a source, and what the licenses in them allow.

A map is a YAML file of this folder, for strings that only one source has; it says where they were read. A recipe names
it, and may add strings of its own. Strings that many sources have are read by free_text.py. A string that is not
understood has no expression, and then the document is not used. The license fields of debian/copyright files (DEP-5)
are parsed as well: alternatives, conjunctions, exceptions and `+`.

A map and free_text.yaml decide what acquire writes: whoever changes one raises the version of that stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.bounds import License, spdx
from pipeline.core.yaml_text import parse_yaml
from stages.data.acquire.licenses import free_text

# {keyword of an exception: its SPDX identifier}. An exception only adds permissions, so a license with one that has
# no identifier is stated without it.
EXCEPTIONS = {"font": "Font-exception-2.0"}
MapName = Literal["common-pile", "the-stack", "tulu-3", "dep5", "pep639"]
# The license of a web page that states none.
UNKNOWN_WEB = "LicenseRef-unknown-web"
# In the counts of a source and in the dispositions: the license of a document whose own is unknown.
UNMAPPED = "LicenseRef-unmapped"
Licenses = Annotated[tuple[License, ...], Field(max_length=1000)]
# The rule of the dispositions of documents under other licenses.
NOT_ALLOWED = "license/not-allowed"
# Matches the SPDX identifiers of licenses that forbid derived works: CC-BY-ND-4.0, CC-BY-NC-ND-3.0-DE.
NO_DERIVATIVES = re.compile(r"(^|-)ND(-|$)", re.IGNORECASE)
# Dedications to the public domain, and licenses without conditions.
FREE = """
0BSD CC-PDDC CC0-1.0 LicenseRef-Public-Domain LicenseRef-public-domain MIT-0 PDDL-1.0 SAX-PD Unlicense WTFPL
"""


def normalized_name(name: str) -> str:
    """Returns a short name in lower case, without zeros at the end of its version.

    GPL-2.0+ and gpl-2+ are thus equal.
    """
    return re.sub(r"(?<=\d)(\.0)+(?=\+?$)", "", name.casefold())


def dep5_expression(text: str, names: Mapping[str, str]) -> str | None:
    """Returns the SPDX expression of the first line of a license field; None if one of its names is unknown.

    `names` maps normalized short names to SPDX expressions.
    """
    text = free_text.OR_LATER.sub("+", " ".join(text.split()))
    text = re.sub(r" and/or ", " or ", text, flags=re.IGNORECASE)
    # A comma before the conjunction groups what stands before it (DEP-5).
    parts = re.split(r",\s+(and|or)\s+", text, flags=re.IGNORECASE)
    result = _alternatives(parts[0], names)
    for conjunction, part in zip(parts[1::2], parts[2::2], strict=True):
        operand = _alternatives(part, names)
        if result is None or operand is None:
            return None
        result = f"{_grouped(result)} {conjunction.upper()} {_grouped(operand)}"
    return result


def _alternatives(text: str, names: Mapping[str, str]) -> str | None:
    """Returns the expression of a text without commas."""
    alternatives = []
    for alternative in re.split(r"\s+or\s+", text, flags=re.IGNORECASE):
        operands = [_license(operand, names) for operand in re.split(r"\s+and\s+", alternative, flags=re.IGNORECASE)]
        licenses = [operand for operand in operands if operand is not None]
        if len(licenses) < len(operands):
            return None
        alternatives.append(licenses[0] if len(licenses) == 1 else " AND ".join(map(_grouped, licenses)))
    return " OR ".join(alternatives)


def _license(text: str, names: Mapping[str, str]) -> str | None:
    """Returns the expression of a short name, which a `+` and an exception may follow."""
    name, _, exception = (part.strip() for part in re.sub(r"\s+with\s+", "\0", text, flags=re.I).partition("\0"))
    license = _or_later(normalized_name(name), names)
    if license is None or not exception:
        return license
    keyword = re.fullmatch(r"(.+?)\s+exception", exception, re.IGNORECASE)
    if keyword is None:
        return None
    identifier = EXCEPTIONS.get(keyword[1].casefold())
    # An exception without an SPDX identifier is left out: it only permits more.
    return license if identifier is None or " " in license else f"{license} WITH {identifier}"


def _or_later(name: str, names: Mapping[str, str]) -> str | None:
    """Returns the license of a normalized name: with `+`, also its later versions."""
    if not name.endswith("+"):
        return names.get(name)
    license = names.get(name[:-1])
    # Only an SPDX license with versions has an or-later form.
    if license is None or " " in license or license.startswith("LicenseRef-"):
        return None
    return f"{license.removesuffix('-only')}-or-later" if license.endswith("-only") else f"{license}+"


def _grouped(expression: str) -> str:
    return f"({expression})" if " OR " in expression or " AND " in expression else expression


@dataclass(frozen=True)
class LicenseMap:
    """A map of license strings.

    Attributes:
        licenses: {string: SPDX expression}.
        syntax: Other strings that are understood: `text`, what free_text.py reads; `spdx`, an expression; `dep5`, a
            license field of debian/copyright.
        several: True if several licenses of a list all apply; otherwise they have no expression.
        ignored: Strings that state no license.
    """

    licenses: Mapping[str, str]
    syntax: Literal["text", "spdx", "dep5"] = "spdx"
    several: bool = True
    ignored: tuple[str, ...] = ()

    def expression(self, value: object) -> str | None:
        """Returns the SPDX expression of a string, or of a list of strings that all apply.

        None if there is none, or if one of the strings is unknown.
        """
        values = value if isinstance(value, (list, tuple)) else [value]
        strings = [text for text in values if text not in self.ignored]
        expressions = {self._expression_of(text) if isinstance(text, str) else None for text in strings}
        if not expressions:
            return None
        # Some sources list alternatives and some what applies together; without a word on it, none is taken.
        if len(expressions) > 1 and not self.several:
            return None
        return free_text.all_of(expressions)

    def extended(self, licenses: Mapping[str, str]) -> LicenseMap:
        """Returns the map with the strings of a recipe, which come first."""
        return LicenseMap({**self.licenses, **licenses}, self.syntax, self.several, self.ignored)

    @cached_property
    def _expression_of(self) -> Callable[[str], str | None]:
        # The strings of a corpus are few; a map of a stranger's corpus may meet a new one in every document.
        return lru_cache(maxsize=100_000)(self._parse)

    def _parse(self, text: str) -> str | None:
        stripped = text.strip()
        if stripped.casefold() in self._names:
            return spdx(self._names[stripped.casefold()])
        try:
            if self.syntax == "text":
                return free_text.expression_of(stripped)
            if self.syntax == "dep5":
                expression = dep5_expression(stripped, self._normalized_names)
                return None if expression is None else spdx(expression)
            return free_text.stated_spdx(stripped) if len(stripped) <= 2000 else None
        except (ValueError, RecursionError):
            return None

    @cached_property
    def _names(self) -> dict[str, str]:
        return {name.strip().casefold(): license for name, license in self.licenses.items()}

    @cached_property
    def _normalized_names(self) -> dict[str, str]:
        return {normalized_name(name): license for name, license in self.licenses.items()}


@cache
def load_map(name: MapName) -> LicenseMap:
    """Returns a shipped map."""
    content = (files(__package__) / f"{name}.yaml").read_bytes()
    fields: dict[str, Any] = parse_yaml(content, f"license map {name}")
    return LicenseMap(**{**fields, "ignored": tuple(fields.get("ignored", ()))})


class AllowedLicenses:
    """Decides whether a license is allowed, from a list of SPDX identifiers and expressions.

    Of `A OR B`, which leaves the choice to the reader, one must be allowed; of `A AND B` both; of `A WITH B` that, or
    A, because an exception only adds permissions. An expression in the list allows itself as a whole.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(map(spdx, allowed))
        self.allows = lru_cache(maxsize=100_000)(self._allows)

    def _allows(self, license: str) -> bool:
        return license in self._allowed or _holds(license, lambda name: name in self._allowed)


def _holds(expression: str, verdict: Callable[[str], bool]) -> bool:
    """Returns True if the licenses for which `verdict` is true fulfill an SPDX expression; False for another text."""

    def digit(match: re.Match[str]) -> str:
        name = match[0]
        return name if name in ("AND", "OR") else f"{verdict(name) or verdict(name.partition(' ')[0]):d}"

    # In place of each license its verdict, then of each pair of brackets.
    text = re.sub(r"[^\s()]+( WITH [^\s()]+)?", digit, expression)
    while (group := re.search(r"\(([^()]*)\)", text)) is not None:
        text = f"{text[: group.start()]}{_one_holds(group[1]):d}{text[group.end() :]}"
    return _one_holds(text)


def _one_holds(text: str) -> bool:
    """Returns True if one alternative consists of `1` only, for operands joined by OR, which binds weaker, and AND."""
    return any(set(alternative.split(" AND ")) == {"1"} for alternative in text.split(" OR "))


def forbids_derivatives(expression: str) -> bool:
    """Returns True if an SPDX expression forbids derived works, such as rephrased texts.

    It forbids them if each of its alternatives does. True also for a text that is no expression.
    """
    try:
        return not _holds(spdx(expression), lambda name: not NO_DERIVATIVES.search(name.partition(" ")[0]))
    except (ValueError, RecursionError):
        return True


_FREE = AllowedLicenses([*FREE.split(), UNKNOWN_WEB])


def asks_for_attribution(expression: str) -> bool:
    """Returns True if an SPDX expression asks to name authors or to keep notices, whichever alternative one chooses.

    False for web text without a license, whose terms nobody knows. True for a text that is no expression.
    """
    return not _FREE.allows(expression)
