"""Licenses that ask to name authors, or to keep notices: all but the few that ask for nothing."""

from __future__ import annotations

from stages.data.acquire.licenses.allow import AllowedLicenses
from stages.data.acquire.licenses.maps import UNKNOWN_WEB

FREE = (
    "0BSD", "CC-PDDC", "CC0-1.0", "LicenseRef-Public-Domain", "LicenseRef-public-domain", "MIT-0", "PDDL-1.0", "SAX-PD",
    "Unlicense", "WTFPL",
)  # fmt: skip
"""Dedications to the public domain, and licenses without conditions."""
_FREE = AllowedLicenses([*FREE, UNKNOWN_WEB])


def asks_for_attribution(expression: str) -> bool:
    """Whether an SPDX expression asks to name authors or to keep notices, whichever of its alternatives one chooses.

    False for web text without a license, whose terms nobody knows. True for a text that is no expression.
    """
    try:
        return not _FREE.allows(expression)
    except (IndexError, RecursionError):
        return True
