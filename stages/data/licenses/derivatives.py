"""Licenses that forbid derived works, such as rephrased texts: those of Creative Commons with NoDerivatives."""

from __future__ import annotations

import re

from stages.data.licenses.allow import AllowedLicenses

NO_DERIVATIVES = re.compile(r"(^|-)ND(-|$)", re.IGNORECASE)
"""Matches the SPDX identifiers of such licenses: CC-BY-ND-4.0, CC-BY-NC-ND-3.0-DE."""


def forbids_derivatives(expression: str) -> bool:
    """Whether an SPDX expression forbids derived works, whichever of its alternatives one chooses. True for a text that
    is no expression."""
    identifiers = re.findall(r"[^\s()]+", re.sub(r" WITH \S+", "", expression))
    allowed = [name for name in identifiers if not NO_DERIVATIVES.search(name) and name not in ("AND", "OR")]
    try:
        return not AllowedLicenses(allowed).allows(expression)
    except (IndexError, RecursionError, ValueError):
        return True
