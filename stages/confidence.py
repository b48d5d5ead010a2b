"""Estimates with their standard errors, as plain dictionaries for `scores.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NotRequired, TypedDict

Z95 = 1.959963984540054
"""Half the width of a normal 95 % interval, in standard errors."""


class Figure(TypedDict):
    """An estimate and its standard error."""

    value: float
    se: float


class Mean(Figure):
    """A mean over `n` items."""

    n: int


class Ratio(Figure):
    """A ratio of two sums over documents.

    Attributes:
        documents: The number of documents.
        bytes: The sum below the line, if it is of bytes.
        tokens: The sum below the line, if it is of tokens.
    """

    documents: int
    bytes: NotRequired[int]
    tokens: NotRequired[int]


def ratio(pairs: Sequence[tuple[float, int]], unit: Literal["bytes", "tokens"] = "bytes") -> Ratio:
    """Returns a ratio of sums and its linearised standard error over documents (Cochran, Sampling Techniques, §6.3).

    Args:
        pairs: (bits, size) of each document, at least two.
        unit: The unit of the sizes.
    """
    n, total = len(pairs), sum(size for _, size in pairs)
    value = math.fsum(bits for bits, _ in pairs) / total
    spread = math.fsum((bits - value * size) ** 2 for bits, size in pairs)
    estimate: Ratio = {"value": value, "se": math.sqrt(n / (n - 1) * spread) / total, "documents": n}
    estimate[unit] = total
    return estimate


def binomial(scores: Sequence[int]) -> Mean:
    """Returns the share of ones among zeros and ones, and its binomial standard error."""
    n, p = len(scores), sum(scores) / len(scores)
    return {"value": p, "se": math.sqrt(p * (1 - p) / n), "n": n}


def clustered(values: Sequence[float]) -> Mean:
    """Returns the mean of one value per item and its standard error over items, of which there are at least two.

    Answers to one item are correlated, so they are averaged first (Miller 2024, arXiv 2411.00640).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return {"value": mean, "se": math.sqrt(spread / (n - 1) / n), "n": n}


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of the share of wins among n (Wilson 1927).

    A draw counts as half a win, which makes the interval conservative.
    """
    p, z = wins / n, Z95
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def powers_of_two(n: int) -> list[int]:
    """Returns the powers of two below n, and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def pass_at(n: int, correct: int, k: int) -> float:
    """Returns the probability that at least one of k answers is correct.

    The k are drawn without replacement from n answers, of which `correct` are correct. This is the unbiased estimator
    of pass@k (Chen et al. 2021, arXiv 2107.03374).
    """
    # As a fraction, since binomials of many answers are beyond the range of floats.
    return float(1 - Fraction(math.comb(n - correct, k), math.comb(n, k)))
