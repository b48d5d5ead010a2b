"""Scaling laws of runs: those of `atom predict`, which are sealed before a training, and those of `atom ladder`.

`atom predict` has a power law L = a C^-b + c of a loss against training FLOPs, and a logistic curve of an accuracy.
Bands are prediction intervals of least squares: they hold the scatter of the runs about the law and what is not known
of its parameters, and widen away from the runs. With few runs they are wide, since Student's t is.

`atom ladder` fits L = E + A/N^alpha + B/D^beta of parameters N and tokens D (Hoffmann et al. 2022, arXiv:2203.15556),
with bands from a bootstrap.

Losses are fitted by the least squares of their logarithms. The band holds the middle LEVEL of refits to the law plus
its own residuals, drawn with replacement, and, where one further run is predicted, the scatter of a run. Everything is
drawn from one fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# Student's t for a two-sided interval of 90 %, by degrees of freedom from 1; the last one for more, too.
STUDENT = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746,
    1.740, 1.734, 1.729, 1.725,
)  # fmt: skip


@dataclass(frozen=True)
class Band:
    """A value, and the interval in which, with 90 %, one further run is expected."""

    value: float
    low: float
    high: float


def power_law(flops: Sequence[float], losses: Sequence[float], floors: int = 400) -> dict[str, float]:
    """Returns a, b and c of L = a C^-b + c.

    For each c of a grid the rest is least squares of log(L - c) against log C; the c with the least error of log L is
    kept.

    Args:
        flops: FLOPs C of each run.
        losses: Loss L of each run.
        floors: Number of values of c in the grid, from 0 on.
    """
    x, y = np.log(np.asarray(flops)), np.asarray(losses)
    # The law is linear in log C for a given floor c, so that only c needs a search.
    c = np.linspace(0, 0.999 * y.min(), floors)[:, None]
    logs = np.log(y - c)  # [grid, runs]
    dx = x - x.mean()
    slope = (logs * dx).sum(1) / (dx * dx).sum()
    height = logs.mean(1) - slope * x.mean()
    errors = ((np.log(np.exp(height[:, None] + slope[:, None] * x) + c) - np.log(y)) ** 2).sum(1)
    best = int(np.argmin(np.where(slope < 0, errors, np.inf)))
    return {"a": float(np.exp(height[best])), "b": float(-slope[best]), "c": float(c[best, 0])}


def predicted_loss(law: dict[str, float], flops: Any) -> Any:
    return law["a"] * np.asarray(flops) ** -law["b"] + law["c"]


def loss_band(flops: Sequence[float], losses: Sequence[float], target: float) -> tuple[dict[str, float], Band]:
    """Returns the power law of runs, and what it says of `target` FLOPs.

    Three runs lie on a law of three parameters whatever they are, so c is 0 with them; of more runs the band is that of
    the law made linear in a, b and c.

    Raises ValueError with a sentence if the losses do not fall.
    """
    parameters = 2 if len(losses) == 3 else 3
    law = power_law(flops, losses, 400 if parameters == 3 else 1)
    if law["b"] <= 0:
        raise ValueError("the losses of the runs do not fall with compute")
    rest = np.log(np.asarray(losses)) - np.log(predicted_loss(law, flops))
    freedom = len(losses) - parameters
    # By singular values, and not by the inverse of a matrix that is nearly singular with few runs.
    _, sizes, axes = np.linalg.svd(_gradients(law, flops)[:, :parameters], full_matrices=False)
    (distance,) = _gradients(law, [target])[:, :parameters] @ axes.T / sizes
    reach = STUDENT[min(freedom, len(STUDENT)) - 1] * np.sqrt((rest**2).sum() / freedom * (1 + (distance**2).sum()))
    value = np.log(predicted_loss(law, target))
    low, middle, high = (float(np.exp(part)) for part in (value - reach, value, value + reach))
    return law, Band(middle, low, high)


def _gradients(law: dict[str, float], flops: Sequence[float]) -> Any:
    """Returns the derivatives of log L by log a, b and c, [runs, 3]."""
    x = np.log(np.asarray(flops))
    power = law["a"] * np.exp(-law["b"] * x)
    return np.stack([power, -x * power, np.ones_like(x)], axis=-1) / (power + law["c"])[:, None]


def accuracy_band(
    flops: Sequence[float], accuracies: Sequence[float], items: int, target: float
) -> tuple[dict[str, float], Band]:
    """Returns the logistic curve of runs in log C, and what it says of `target` FLOPs.

    Args:
        flops: FLOPs C of each run.
        accuracies: Accuracy of each run.
        items: The number that each accuracy is over; half an item is added to right and wrong ones, so that 0 and 1
            have a logit.
        target: FLOPs for which the curve is read.
    """
    share = (np.asarray(accuracies) * items + 0.5) / (items + 1)
    x, logits = np.log(np.asarray(flops)), np.log(share / (1 - share))
    slope = float(((x - x.mean()) * logits).sum() / ((x - x.mean()) ** 2).sum())
    value, low, high = (float(1 / (1 + np.exp(-part))) for part in _line_band(flops, logits, target))
    return {"slope": slope, "height": float(logits.mean() - slope * x.mean())}, Band(value, low, high)


def _line_band(flops: Sequence[float], values: Any, target: float) -> tuple[float, float, float]:
    """Returns the line of least squares of values against log C at the target, and its prediction interval."""
    x = np.log(np.asarray(flops))
    n, dx = len(x), x - x.mean()
    slope = (dx * values).sum() / (dx * dx).sum()
    at = values.mean() + slope * (np.log(target) - x.mean())
    rest = values - values.mean() - slope * dx
    spread = np.sqrt((rest**2).sum() / (n - 2))
    reach = STUDENT[min(n - 2, len(STUDENT)) - 1] * spread
    reach *= np.sqrt(1 + 1 / n + (np.log(target) - x.mean()) ** 2 / (dx * dx).sum())
    return float(at), float(at - reach), float(at + reach)


# A float64 array; its shape stands with each name.
Array = Any
# The law of `atom ladder`, its columns, and its number of parameters.
FORMULA, COLUMNS, PARAMETERS = "loss = E + A/parameters^alpha + B/tokens^beta", ("parameters", "tokens"), 5
# The share of a band, and the refits of a bootstrap.
LEVEL, DRAWS, SEED = 0.9, 400, 0
ITERATIONS = 60
# A prediction beyond so many times the points, or below the same part of them, is an extrapolation.
WITHIN = 10.0
# Scatter of ln tokens about a line in ln parameters: with less scatter the two cannot be told apart.
COLLINEAR = 0.05
# Values of each column that a law needs: two do not tell a floor from a slope.
DISTINCT = 3


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        points: Columns [C, n], of COLUMNS.
        parameters: Parameters of the search [P]: logarithms, and exponents.
        draws: The same of the refits [DRAWS, P].
        residuals: Deviations of ln loss at the points.
    """

    points: Array
    parameters: Array
    draws: Array
    residuals: Array

    def published(self) -> dict[str, Band]:
        """Returns the parameters of the formula, with their bands."""
        value, drawn = published(self.parameters[None]), published(self.draws)
        return {name: band(float(value[name][0]), drawn[name]) for name in value}

    def predict(self, point: Sequence[float]) -> Band:
        """Returns what is expected of one further run at a point."""
        at = np.asarray(point, float)[:, None]
        value, drawn = (_log_losses(p, at)[:, 0] for p in (self.parameters[None], self.draws))
        # Another seed than that of the refits, so that the two are independent.
        scatter = np.random.default_rng(SEED + 1).choice(self.residuals, len(drawn))
        return band(float(np.exp(value)[0]), np.exp(drawn + scatter))

    def extrapolates(self, point: Mapping[str, float]) -> list[str]:
        """Returns a sentence for each column whose value is far outside those of the points."""
        sentences = []
        for name, row in zip(COLUMNS, self.points, strict=True):
            value = point[name]
            if value > WITHIN * row.max():
                times = f"{value / row.max():.3g} times the largest"
            elif value < row.min() / WITHIN:
                times = f"{row.min() / value:.3g} times below the least"
            else:
                continue
            sentences.append(
                f"{name} = {value:.3g} is {times} of the points; beyond {WITHIN:g} times no band says how wrong it is"
            )
        return sentences

    @cached_property
    def rms(self) -> float:
        """Root mean square of the relative residuals."""
        return float(np.sqrt((self.residuals**2).mean()))


def band(value: float, drawn: Array) -> Band:
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Band(value, min(float(low), value), max(float(high), value))


def fit(columns: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """Fits a law to points, given as columns [C, n] and values [n].

    Raises ValueError with a sentence if the points cannot carry it.
    """
    x, y = np.asarray(columns, float), np.asarray(values, float)
    _require_enough(x)
    starts = _starts(x, y)
    y = np.log(y)
    # From many starts: the loss of a fit has local minima.
    candidates, costs = _minimize(starts, x, np.broadcast_to(y, (len(starts), len(y))))
    best = candidates[int(np.argmin(costs))]
    law = _log_losses(best[None], x)[0]
    # The fit takes up part of the scatter, by its number of parameters.
    freedom = len(y) - len(best)
    residuals = (y - law) * np.sqrt(len(y) / freedom)
    # Centered, so that the refits do not drift away from the law.
    residuals = residuals - residuals.mean()
    drawn = law + np.random.default_rng(SEED).choice(residuals, (DRAWS, len(y)))
    # Each refit begins at the law, which is near, so that one start is enough.
    draws, _ = _minimize(np.broadcast_to(best, (DRAWS, len(best))), x, drawn)
    if min(best[3:]) <= 0:
        name = COLUMNS[int(np.argmin(best[3:]))]
        raise ValueError(f"the loss gets worse with {name} where the rest is equal, so that no law of scale holds")
    return Fit(x, best, draws, residuals)


def _require_enough(x: Array) -> None:
    if x.shape[1] <= PARAMETERS:
        raise ValueError(
            f"the law has {PARAMETERS} parameters and needs more points than that, and there are {x.shape[1]}"
        )
    for name, row in zip(COLUMNS, x, strict=True):
        count = len(set(row.tolist()))
        if count < DISTINCT:
            raise ValueError(
                f"the points have {count} different {'value' if count == 1 else 'values'} of {name}, and the law "
                f"needs {DISTINCT}"
            )
    # Tokens in a fixed ratio to parameters would let the two terms of the law trade places.
    logs = np.log(x)
    slope, height = _line(logs[0], logs[1])
    if np.std(logs[1] - slope * logs[0] - height) < COLLINEAR:
        raise ValueError(
            "tokens follow from parameters at all points, so what each buys cannot be told apart; train a size on "
            "another number of tokens"
        )


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Returns slope and height of the line of least squares."""
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx * dx).sum())
    return slope, float(y.mean() - slope * x.mean())


def _minimize(starts: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Fits the law by Levenberg-Marquardt, from each of B starts on its own.

    Args:
        starts: The starts [B, P].
        x: The places of the values.
        y: The values [B, n] that each start is fitted to.

    Returns:
        The parameters [B, P] and their costs [B].
    """
    theta, count = np.array(starts, float), starts.shape[1]
    damping = np.full(len(theta), 1e-2)
    rest = _log_losses(theta, x) - y
    cost = (rest**2).sum(1)
    for _ in range(ITERATIONS):
        # Derivatives by differences, since the law states none.
        steps = 1e-6 * np.maximum(1.0, np.abs(theta))
        jacobian = np.empty((*rest.shape, count))
        for k in range(count):
            moved = theta.copy()
            moved[:, k] += steps[:, k]
            jacobian[:, :, k] = (_log_losses(moved, x) - _log_losses(theta, x)) / steps[:, k, None]
        normal = np.einsum("bnp,bnq->bpq", jacobian, jacobian)
        gradient = np.einsum("bnp,bn->bp", jacobian, rest)
        diagonal = np.einsum("bpp->bp", normal)
        damped = normal + (damping[:, None] * diagonal + 1e-12)[:, :, None] * np.eye(count)
        change = np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        # A step is bounded, since parameters are logarithms and exponents.
        tried = theta - np.clip(change, -2.0, 2.0)
        with np.errstate(all="ignore"):
            tried_rest = _log_losses(tried, x) - y
            tried_cost = np.where(np.isfinite(tried_rest).all(1), (tried_rest**2).sum(1), np.inf)
        # Each start has its own damping: less after a step that helps, more after one that does not.
        better = tried_cost < cost
        theta[better], rest[better], cost[better] = tried[better], tried_rest[better], tried_cost[better]
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
    return theta, cost


def _log_losses(p: Array, x: Array) -> Array:
    """Returns ln loss [B, n] of parameters [B, P] at columns [C, n]."""
    # By logarithms, so that no parameter becomes negative and no power overflows.
    n, d = np.log(x)
    terms = [
        np.broadcast_to(p[:, :1], (len(p), x.shape[1])),
        p[:, 1:2] - p[:, 3:4] * n,
        p[:, 2:3] - p[:, 4:5] * d,
    ]
    return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])


def _starts(x: Array, y: Array) -> Array:
    """Returns starts with the exponents of a grid, and with floors below the least loss.

    The two other terms share the rest of the loss at the middle of the points.
    """
    n, d = np.log(x).mean(1)
    starts = []
    for share in (0.2, 0.5, 0.8, 0.95):
        floor = share * y.min()
        half = np.log(max(y.mean() - floor, 1e-9) / 2)
        starts += [[np.log(floor), half + a * n, half + b * d, a, b] for a in (0.1, 0.3, 0.6) for b in (0.1, 0.3, 0.6)]
    return np.asarray(starts)


def published(p: Array) -> dict[str, Array]:
    """Returns the parameters of the formula, from those of the search [B, P]."""
    return {"E": np.exp(p[:, 0]), "A": np.exp(p[:, 1]), "B": np.exp(p[:, 2]), "alpha": p[:, 3], "beta": p[:, 4]}
