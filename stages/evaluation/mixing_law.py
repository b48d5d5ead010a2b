"""The law of `atom mix`: bits per byte of each domain as a function of the weights of the sources.

Of weights w that sum to 1, a domain has bits(w) = floor + exp(slopes · w) (Data Mixing Laws, Ye et al. 2024,
arXiv:2403.16952; their factor of the exponential is a part of the slopes here, since the weights sum to 1). Olmix
(arXiv:2602.12237) kept this form after a comparison with other regressions.

Each domain is fitted by the least squares of its bits. A sum of such laws with factors of at least 0 is convex in the
weights, so that its minimum within bounds is the only one. A fit takes time in proportion to runs x sources^2 for each
domain, of which leaving out takes one for each run and the bootstrap DRAWS. Memory: DRAWS x domains x sources numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares
from scipy.stats import spearmanr

# A float64 array; its shape stands with each name.
Array = Any
FORMULA = "bits = floor + exp(sum of slope x weight over sources)"
# The refits of a bootstrap, and its seed.
DRAWS, SEED = 100, 0
# Floors from which a fit starts, as shares of the least bits: the loss of a fit has local minima.
STARTS = (0.05, 0.3, 0.6, 0.9)
# The largest exponent, so that no trial of a fit overflows.
MOST = 50.0
# Runs that a law needs beside one for each source: one for the floor, one to leave out, one to judge by.
SPARE = 3
# Steps of a proposal at most, and the weight, and the share of the bits, that is too small for another one.
STEPS, LEAST = 10_000, 1e-9
# A published weight is a multiple of one in so many.
UNITS = 1_000_000


@dataclass(frozen=True)
class Law:
    """The laws of D domains in the weights of S sources, or many such laws at once.

    Attributes:
        floors: Bits that no mix removes [..., D].
        slopes: Exponents for each source [..., D, S].
    """

    floors: Array
    slopes: Array

    def bits(self, weights: Array) -> Array:
        """Returns the bits per byte [..., D] at weights [S], or of one law [n, D] at weights [n, S]."""
        return self.floors + np.exp(np.minimum(weights @ np.swapaxes(self.slopes, -1, -2), MOST))


@dataclass(frozen=True)
class Fit:
    """A law with the runs that it was fitted to.

    Attributes:
        weights: Weights of the runs [n, S].
        measured: Bits per byte of the runs [n, D].
        law: The law.
    """

    weights: Array
    measured: Array
    law: Law

    @cached_property
    def left_out(self) -> Array:
        """The bits of each run by a law that was fitted to the other runs [n, D]."""
        x, y = self.weights, self.measured
        return np.asarray([_fit(np.delete(x, n, 0), np.delete(y, n, 0), self.law).bits(x[n]) for n in range(len(x))])

    @cached_property
    def draws(self) -> Law:
        """DRAWS laws of a bootstrap: refits to the law plus residuals of runs, drawn with replacement.

        All runs stay in each refit, or a source that few runs have would be lost in some. The residuals of one run stay
        together, since they have one cause.
        """
        count, sources = self.weights.shape
        fitted = self.law.bits(self.weights)
        # The fit takes up part of the scatter, by its number of parameters.
        residuals = (self.measured - fitted) * np.sqrt(count / (count - sources - 1))
        # Centered, so that the refits do not drift away from the law.
        residuals = residuals - residuals.mean(axis=0)
        chosen = np.random.default_rng(SEED).integers(count, size=(DRAWS, count))
        # Large residuals could lead below 0, where no text is.
        laws = [_fit(self.weights, np.maximum(fitted + residuals[rows], 1e-6), self.law) for rows in chosen]
        return Law(np.asarray([law.floors for law in laws]), np.asarray([law.slopes for law in laws]))


def fit(weights: Array, measured: Array) -> Fit:
    """Fits the law of each domain.

    Args:
        weights: Weights of the runs [n, S], each with the sum 1; at least S + SPARE, which span all sources.
        measured: Bits per byte of the runs [n, D], above 0.
    """
    return Fit(weights, measured, _fit(weights, measured))


def _fit(x: Array, y: Array, near: Law | None = None) -> Law:
    """Fits each domain, from several starts or from a law that is near."""
    found = []
    for domain, values in enumerate(y.T):
        shares = STARTS if near is None else [np.clip(near.floors[domain] / values.min(), 0.01, 0.99)]
        floors = values.min() * np.asarray(shares)
        # For a given floor, the logarithm of the rest is linear in the weights.
        starts = [np.r_[floor, np.linalg.lstsq(x, np.log(values - floor), rcond=None)[0]] for floor in floors]
        found.append(min((_least_squares(x, values, start) for start in starts), key=lambda result: result.cost).x)
    parameters = np.asarray(found)
    return Law(parameters[:, 0], parameters[:, 1:])


def _least_squares(x: Array, values: Array, start: Array) -> Any:
    def power(parameters: Array) -> Array:
        return np.exp(np.minimum(x @ parameters[1:], MOST))

    return least_squares(
        lambda parameters: parameters[0] + power(parameters) - values,
        start,
        lambda parameters: np.c_[np.ones(len(values)), power(parameters)[:, None] * x],
        # Bits are not below 0, and a floor above a measured value would contradict it.
        bounds=([0.0, *[-np.inf] * x.shape[1]], [values.min(), *[np.inf] * x.shape[1]]),
        x_scale="jac",
    )


def rank_correlation(expected: Array, measured: Array) -> float:
    """Returns Spearman's rank correlation; 0 if all values of one side are equal."""
    return float(spearmanr(expected, measured).statistic) if np.ptp(expected) and np.ptp(measured) else 0.0


def propose(law: Law, factors: Array, limits: Array) -> Array:
    """Returns the weights [S] with the least bits, which sum to 1; none is above its limit.

    Weight moves from one source to another, again and again between the two for which this helps most, as far as it
    helps. This is sequential minimal optimization (Platt 1998), which ends at the minimum of a convex function.

    Args:
        law: The law.
        factors: Factors of the domains [D] in the sum of bits, at least 0.
        limits: Largest weight of each source [S], at most 1, whose whole UNITS sum to 1 or more.
    """
    mix = limits / limits.sum()
    for _ in range(STEPS):
        powers = factors * (law.bits(mix) - law.floors)
        slopes = powers @ law.slopes
        giver = np.argmax(np.where(mix > LEAST, slopes, -np.inf))
        taker = np.argmin(np.where(limits - mix > LEAST, slopes, np.inf))
        if slopes[giver] - slopes[taker] <= LEAST * powers.sum():
            break
        rates, most = law.slopes[:, taker] - law.slopes[:, giver], min(mix[giver], limits[taker] - mix[taker])

        def slope(moved: float, powers: Array = powers, rates: Array = rates) -> float:
            return float((powers * rates) @ np.exp(rates * moved))

        mix[[giver, taker]] += np.array([-1, 1]) * (most if slope(most) <= 0 else brentq(slope, 0.0, most))
    return rounded(mix, limits)


def rounded(weights: Array, limits: Array) -> Array:
    """Returns weights near others [S], in whole UNITS, that sum to 1 and are not above limits [S]."""
    most, exact = np.floor(limits * UNITS), weights * UNITS
    counts = np.clip(np.floor(exact), 0, most)
    # What is missing goes to the sources that lost most by rounding, as far as their limits have room.
    for source in np.argsort(counts - exact, kind="stable"):
        counts[source] += np.clip(UNITS - counts.sum(), -counts[source], most[source] - counts[source])
    return counts / UNITS
