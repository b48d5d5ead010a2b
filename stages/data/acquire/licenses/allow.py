"""The licenses that a source allows, that forbid derived works, and that ask for attribution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import License, spdx
from stages.data.acquire.licenses.maps import UNKNOWN_WEB

Licenses = Annotated[tuple[License, ...], Field(max_length=1000)]
# The rule of the dispositions of documents under other licenses.
NOT_ALLOWED = "license/not-allowed"
# Matches the SPDX identifiers of licenses that forbid derived works: CC-BY-ND-4.0, CC-BY-NC-ND-3.0-DE.
NO_DERIVATIVES = re.compile(r"(^|-)ND(-|$)", re.IGNORECASE)
# Dedications to the public domain, and licenses without conditions.
FREE = """
0BSD CC-PDDC CC0-1.0 LicenseRef-Public-Domain LicenseRef-public-domain MIT-0 PDDL-1.0 SAX-PD Unlicense WTFPL
"""


class AllowedLicenses:
    """Decides whether a license is allowed, from a list of SPDX identifiers and expressions.

    Of `A OR B`, which leaves the choice to the reader, one must be allowed; of `A AND B` both; of `A WITH B` that, or
    A, because an exception only adds permissions. An expression in the list allows itself as a whole.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(map(spdx, allowed))
        self.allows = lru_cache(maxsize=100_000)(self._allows)

    def _allows(self, license: str) -> bool:
        if license in self._allowed:
            return True
        # A parser by recursive descent: OR binds weaker than AND, and AND weaker than WITH.
        tokens = re.findall(r"[()]|[^\s()]+", license)
        verdict, position = self._alternatives(tokens, 0)
        return verdict and position == len(tokens)

    def _alternatives(self, tokens: list[str], position: int) -> tuple[bool, int]:
        """Returns the verdict on operands joined by OR from a position, and the position after them."""
        verdict, position = self._conjunction(tokens, position)
        while tokens[position : position + 1] == ["OR"]:
            operand, position = self._conjunction(tokens, position + 1)
            verdict = verdict or operand
        return verdict, position

    def _conjunction(self, tokens: list[str], position: int) -> tuple[bool, int]:
        verdict, position = self._operand(tokens, position)
        while tokens[position : position + 1] == ["AND"]:
            operand, position = self._operand(tokens, position + 1)
            verdict = verdict and operand
        return verdict, position

    def _operand(self, tokens: list[str], position: int) -> tuple[bool, int]:
        if tokens[position] == "(":
            verdict, position = self._alternatives(tokens, position + 1)
            return verdict, position + 1
        license, position = tokens[position], position + 1
        if tokens[position : position + 1] == ["WITH"]:
            with_exception, position = f"{license} WITH {tokens[position + 1]}", position + 2
            return license in self._allowed or with_exception in self._allowed, position
        return license in self._allowed, position


def forbids_derivatives(expression: str) -> bool:
    """Returns True if an SPDX expression forbids derived works, such as rephrased texts.

    It forbids them if each of its alternatives does. True also for a text that is no expression.
    """
    identifiers = re.findall(r"[^\s()]+", re.sub(r" WITH \S+", "", expression))
    # Allowed is every other license in the expression, so an alternative without ND is enough.
    allowed = [name for name in identifiers if not NO_DERIVATIVES.search(name) and name not in ("AND", "OR")]
    try:
        return not AllowedLicenses(allowed).allows(expression)
    except (IndexError, RecursionError, ValueError):
        return True


_FREE = AllowedLicenses([*FREE.split(), UNKNOWN_WEB])


def asks_for_attribution(expression: str) -> bool:
    """Returns True if an SPDX expression asks to name authors or to keep notices, whichever alternative one chooses.

    False for web text without a license, whose terms nobody knows. True for a text that is no expression.
    """
    try:
        return not _FREE.allows(expression)
    except (IndexError, RecursionError):
        return True
