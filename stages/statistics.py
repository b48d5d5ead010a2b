"""Estimates with their standard errors, as plain dictionaries for `scores.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def ratio(pairs: Sequence[tuple[float, int]], unit: str = "bytes") -> dict[str, Any]:
    """Ratio of sums with its linearised standard error over documents (Cochran, Sampling Techniques, §6.3).

    pairs: (bits, size) of each document, two at least; `unit` is what the sizes count.
    """
    n, size = len(pairs), sum(b for _, b in pairs)
    value = math.fsum(bits for bits, _ in pairs) / size
    spread = math.fsum((bits - value * b) ** 2 for bits, b in pairs)
    return {"value": value, "se": math.sqrt(n / (n - 1) * spread) / size, "documents": n, unit: size}


def binomial(scores: Sequence[int]) -> dict[str, Any]:
    """Share of ones with its binomial standard error."""
    n, p = len(scores), sum(scores) / len(scores)
    return {"value": p, "se": math.sqrt(p * (1 - p) / n), "n": n}
