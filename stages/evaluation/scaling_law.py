"""Laws of a figure against training FLOPs C: a power law L = a C^-b + c of a loss, a logistic curve of an accuracy.

Bands are prediction intervals of least squares: they hold the scatter of the runs about the law and what is not known
of its parameters, and widen away from the runs. With few runs they are wide, since Student's t is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def fit(flops: Sequence[float], losses: Sequence[float], floors: int = 400) -> dict[str, float]:
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
    law = fit(flops, losses, 400 if parameters == 3 else 1)
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
    value, low, high = (float(1 / (1 + np.exp(-part))) for part in _line(flops, logits, target))
    return {"slope": slope, "height": float(logits.mean() - slope * x.mean())}, Band(value, low, high)


def _line(flops: Sequence[float], values: Any, target: float) -> tuple[float, float, float]:
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
