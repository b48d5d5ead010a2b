"""Estimates with their standard errors, as plain dictionaries for `scores.json`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NotRequired, TypedDict

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
        works: The number of works, if the standard error is over works.
    """

    documents: int
    bytes: NotRequired[int]
    tokens: NotRequired[int]
    works: NotRequired[int]


def ratio(
    pairs: Sequence[tuple[float, int]], unit: Literal["bytes", "tokens"] = "bytes", works: Sequence[str] = ()
) -> Ratio:
    """Returns a ratio of sums and its linearised standard error (Cochran, Sampling Techniques, §6.3).

    Args:
        pairs: (bits, size) of each document.
        unit: The unit of the sizes.
        works: The work of each document, with at least two different ones. Documents of one work are alike, so the
            standard error is over works. Empty: it is over documents, of which there are at least two.
    """
    total = sum(size for _, size in pairs)
    deviations = work_deviations(pairs, works)
    estimate: Ratio = {
        "value": math.fsum(bits for bits, _ in pairs) / total,
        "se": root_of_squares(deviations.values()) / total,
        "documents": len(pairs),
    }
    estimate[unit] = total
    if works:
        estimate["works"] = len(deviations)
    return estimate


def work_deviations(pairs: Sequence[tuple[float, int]], works: Sequence[Hashable] = ()) -> dict[Hashable, float]:
    """Returns the deviation of each work from the ratio of all, scaled by √(n / (n - 1)) for n works.

    The root of their summed squares is the standard error of the ratio, times the sum of all sizes.

    Args:
        pairs: (bits, size) of each document.
        works: The work of each document; empty: each is one by itself.
    """
    value = math.fsum(bits for bits, _ in pairs) / sum(size for _, size in pairs)
    deviations: dict[Hashable, list[float]] = defaultdict(list)
    for work, (bits, size) in zip(works or range(len(pairs)), pairs, strict=True):
        deviations[work].append(bits - value * size)
    scale = math.sqrt(len(deviations) / (len(deviations) - 1))
    return {work: scale * math.fsum(each) for work, each in deviations.items()}


def root_of_squares(values: Iterable[float]) -> float:
    """Returns the root of the sum of the squares. The sum is exactly rounded, and so the same in any order."""
    return math.sqrt(math.fsum(value**2 for value in values))


def half_width(figure: Figure) -> float:
    """Returns half the width of the 95 % interval of a figure by Student's distribution.

    Its degrees of freedom are those of the works, documents or items of the figure. Over five works the interval is
    1.4 times as wide as the normal one, which is that of a figure without a count.
    """
    from scipy.special import stdtrit

    counts: Mapping[str, Any] = figure
    n = next((counts[name] for name in ("works", "documents", "n") if name in counts), math.inf)
    # The share of one item has the standard error 0, and no degree of freedom. Rounded, so that all processors agree.
    return round(float(stdtrit(max(n - 1, 1), 0.975)), 9) * figure["se"]


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
