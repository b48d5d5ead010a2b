"""Filter `no_secrets`: documents without access tokens and private keys.

Manuals and tests have keys as examples. A release with one is refused, since nobody can tell an example from a key that
is in use.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.data.filters.base import Filter, FilterFunction, Removal
from stages.data.secret_patterns import PATTERNS


class NoSecrets(Filter):
    """Remove documents that have what `atom build` finds as a secret."""

    step: Literal["no_secrets"] = Field(description="selects this step")

    def function(self) -> FilterFunction:
        return _search


def _search(text: str) -> str | Removal:
    data = text.encode()
    for name, pattern in PATTERNS.items():
        if pattern.is_in(data):
            return Removal(name.split(" ", 1)[1].replace(" ", "_").lower(), 1.0, 0.0)
    return text


FILTER = NoSecrets
