"""Estimates with their standard errors, as plain dictionaries for `scores.json`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
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
    """A ratio of sums over documents, by bytes or by tokens."""

    documents: int
    bytes: NotRequired[int]
    tokens: NotRequired[int]


def ratio(pairs: Sequence[tuple[float, int]], unit: Literal["bytes", "tokens"] = "bytes") -> Ratio:
    """Ratio of sums with its linearised standard error over documents (Cochran, Sampling Techniques, §6.3).

    pairs: (bits, size) of each document, two at least; `unit` is what the sizes count.
    """
    n, size = len(pairs), sum(b for _, b in pairs)
    value = math.fsum(bits for bits, _ in pairs) / size
    spread = math.fsum((bits - value * b) ** 2 for bits, b in pairs)
    estimate: Ratio = {"value": value, "se": math.sqrt(n / (n - 1) * spread) / size, "documents": n}
    estimate[unit] = size
    return estimate


def binomial(scores: Sequence[int]) -> Mean:
    """Share of ones with its binomial standard error."""
    n, p = len(scores), sum(scores) / len(scores)
    return {"value": p, "se": math.sqrt(p * (1 - p) / n), "n": n}


def clustered(values: Sequence[float]) -> Mean:
    """Mean of one value per item with its standard error over items, of which there are at least two.

    Answers to one item are correlated, so they are averaged first (Miller 2024, arXiv 2411.00640).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((x - mean) ** 2 for x in values)
    return {"value": mean, "se": math.sqrt(spread / (n - 1) / n), "n": n}


def wilson(wins: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). wins: halves count, which makes the interval conservative."""
    p, z = wins / n, Z95
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, … below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def pass_at(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers is correct, drawn without replacement from n of which `correct` are.

    This is the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374).
    """
    # As a fraction, since binomials of many answers are beyond the range of floats.
    return float(1 - Fraction(math.comb(n - correct, k), math.comb(n, k)))


def majority_at(votes: Sequence[str | None], correct: Collection[str], k: int) -> float:
    """Probability that the most frequent of k answers is correct, if k are drawn without replacement from all.

    It is the expectation of maj@k over every subset, in closed form. None is an answer without a vote; ties are broken
    at random. A correct answer wins with j votes if no other has more; the number of ways to draw the others is a
    convolution.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    abstentions, ways = len(votes) - counts.total(), Fraction(0)
    for winner in sorted(set(correct) & counts.keys()):
        for j in range(1, min(counts[winner], k) + 1):
            others = {(0, 0): 1}  # (answers drawn, number of others with j votes) -> ways
            for other in counts.keys() - {winner}:
                updated: dict[tuple[int, int], int] = defaultdict(int)
                for (drawn, ties), count in others.items():
                    for i in range(min(counts[other], j, k - j - drawn) + 1):
                        updated[drawn + i, ties + (i == j)] += count * math.comb(counts[other], i)
                others = updated
            for (drawn, ties), count in others.items():
                remaining = math.comb(abstentions, k - j - drawn)
                # Of answers with equally many votes, each is chosen equally often.
                ways += Fraction(math.comb(counts[winner], j) * count * remaining, ties + 1)
    return float(ways / math.comb(len(votes), k))
