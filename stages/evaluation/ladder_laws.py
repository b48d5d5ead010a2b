"""Laws of a ladder of runs, fitted with bands from a bootstrap: what `atom ladder` predicts with.

| law | of a point | form | paper |
|---|---|---|---|
| pretraining | parameters N, tokens D | L = E + A/N^alpha + B/D^beta | Hoffmann et al. 2022, arXiv:2203.15556 |
| compute | FLOPs C | L = E + A/C^alpha | Kaplan et al. 2020, arXiv:2001.08361 |
| reinforcement | compute C of RL | S = S0 + (S1 - S0)/(1 + (C_mid/C)^B) | Khatri et al. 2025, arXiv:2510.13786 |
| inference | compute C of an answer | S = exp(-a/C^b) | Brown et al. 2024, arXiv:2407.21787 |

Losses are fitted by their logarithms, scores as they are. The fit is Huber's: a point far from the law counts less. The
band holds the middle LEVEL of refits to the law plus its own residuals, drawn with replacement, and, where one further
run is predicted, the scatter of a run. Everything is drawn from one fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stages.evaluation.scaling_law import Band

# A float64 array; its shape stands with each name.
Array = Any
# The share of a band, and the refits of a bootstrap.
LEVEL, DRAWS, SEED = 0.9, 400, 0
# Residuals beyond so many standard deviations count less (Huber 1964: 95 % efficient for normal scatter).
TUNING = 1.345
ITERATIONS = 60
# A prediction beyond so many times the points, or below the same part of them, is an extrapolation.
WITHIN = 10.0
# Scatter of ln tokens about a line in ln parameters: with less scatter the two cannot be told apart.
COLLINEAR = 0.05
# Values of each column that a law needs: two do not tell a floor from a slope.
DISTINCT = 3


@dataclass(frozen=True)
class Form:
    """The form of a law.

    Attributes:
        name: Name of the law.
        formula: Its formula, for people.
        columns: Names of the figures of a point.
        value: Name of the value.
        count: Number of parameters, P.
        value_of: (internal parameters [B, P], columns [C, n]) to [B, n], on the scale of the fit.
        published: Internal parameters [B, P] to those of the formula.
        starts: (columns [C, n], values [n]) to [S, P], where the search begins.
    """

    name: str
    formula: str
    columns: tuple[str, ...]
    value: str
    count: int
    value_of: Callable[[Array, Array], Array]
    published: Callable[[Array], dict[str, Array]]
    starts: Callable[[Array, Array], Array]

    @property
    def is_loss(self) -> bool:
        return self.value == "loss"

    def scaled(self, values: Array) -> Array:
        return np.log(values) if self.is_loss else values

    def unscaled(self, values: Array) -> Array:
        return np.exp(values) if self.is_loss else values


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        points: Columns [C, n]; parameters [P] and draws [DRAWS, P] are internal ones.
    """

    form: Form
    points: Array
    parameters: Array
    draws: Array
    residuals: Array

    def published(self) -> dict[str, Band]:
        """Returns the parameters of the formula, with their bands."""
        value, drawn = self.form.published(self.parameters[None]), self.form.published(self.draws)
        return {name: band(float(value[name][0]), drawn[name]) for name in value}

    def curve(self, columns: Array) -> tuple[Array, Array, Array]:
        """Returns value, low and high of the law itself at columns [C, n]: without the scatter of a run."""
        value, drawn = self._at(self.parameters[None], columns)[0], self._at(self.draws, columns)
        low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
        # A band holds its value, also where all refits lie to one side of it.
        return value, np.minimum(low, value), np.maximum(high, value)

    def predict(self, point: Sequence[float]) -> Band:
        """Returns what is expected of one further run at a point."""
        at = np.asarray(point, float)[:, None]
        value, drawn = (self.form.value_of(p, at)[:, 0] for p in (self.parameters[None], self.draws))
        # Another seed than that of the refits, so that the two are independent.
        scatter = np.random.default_rng(SEED + 1).choice(self.residuals, len(drawn))
        return band(float(self.form.unscaled(value)[0]), self.form.unscaled(drawn + scatter))

    def extrapolates(self, point: Mapping[str, float]) -> list[str]:
        """Returns a sentence for each column whose value is far outside those of the points."""
        sentences = []
        for name, row in zip(self.form.columns, self.points, strict=True):
            seen, value = row[row > 0], point[name]
            if value > WITHIN * seen.max():
                times = f"{value / seen.max():.3g} times the largest"
            elif value < seen.min() / WITHIN:
                times = f"{seen.min() / value:.3g} times below the least"
            else:
                continue
            sentences.append(
                f"{name} = {value:.3g} is {times} of the points; beyond {WITHIN:g} times no band says how wrong it is"
            )
        return sentences

    @cached_property
    def rms(self) -> float:
        """Root mean square of the residuals, relative for a loss."""
        return float(np.sqrt((self.residuals**2).mean()))

    def _at(self, parameters: Array, columns: Array) -> Array:
        return self.form.unscaled(self.form.value_of(parameters, columns))


def band(value: float, drawn: Array) -> Band:
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Band(value, min(float(low), value), max(float(high), value))


def fit(form: Form, columns: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """Fits a law to points, given as columns [C, n] and values [n].

    Raises ValueError with a sentence if the points cannot carry it.
    """
    x, y = np.asarray(columns, float), np.asarray(values, float)
    _require_enough(form, x, y)
    starts = form.starts(x, y)
    y = form.scaled(y)
    # From many starts: the loss of a fit has local minima.
    candidates, costs = _minimize(form, starts, x, np.broadcast_to(y, (len(starts), len(y))), None)
    best = candidates[int(np.argmin(costs))]
    plain = form.value_of(best[None], x)[0] - y
    # The median absolute deviation of a normal scatter is 0.6745 standard deviations. A few bad points do not move it.
    scale = max(float(np.median(np.abs(plain))) / 0.6745, 1e-9)
    robust, _ = _minimize(form, best[None], x, y[None], scale)
    best = robust[0]
    law = form.value_of(best[None], x)[0]
    # The fit takes up part of the scatter, by its number of parameters.
    freedom = len(y) - len(best)
    residuals = (y - law) * np.sqrt(len(y) / freedom)
    # Centered, so that the refits do not drift away from the law.
    residuals = residuals - residuals.mean()
    drawn = law + np.random.default_rng(SEED).choice(residuals, (DRAWS, len(y)))
    # Each refit begins at the law, which is near, so that one start is enough.
    draws, _ = _minimize(form, np.broadcast_to(best, (DRAWS, len(best))), x, drawn, scale)
    if form is PRETRAINING and min(best[3:]) <= 0:
        name = form.columns[int(np.argmin(best[3:]))]
        raise ValueError(f"the loss gets worse with {name} where the rest is equal, so that no law of scale holds")
    return Fit(form, x, best, draws, residuals)


def _require_enough(form: Form, x: Array, y: Array) -> None:
    if len(y) <= form.count:
        raise ValueError(
            f"the law {form.name} has {form.count} parameters and needs more points than that, and there are {len(y)}"
        )
    for name, row in zip(form.columns, x, strict=True):
        count = len({float(value) for value in row if value > 0})
        if count < DISTINCT:
            raise ValueError(
                f"the points have {count} different {'value' if count == 1 else 'values'} of {name}, and the law "
                f"{form.name} needs {DISTINCT}"
            )
    logs = np.log(np.maximum(x, 1e-300))
    if form is PRETRAINING:
        # Tokens in a fixed ratio to parameters would let the two terms of the law trade places.
        slope, height = _line(logs[0], logs[1])
        if np.std(logs[1] - slope * logs[0] - height) < COLLINEAR:
            raise ValueError(
                "tokens follow from parameters at all points, so what each buys cannot be told apart; train a size on "
                "another number of tokens, or fit --law compute"
            )
    else:
        positive = x[0] > 0
        slope, _ = _line(logs[0][positive], y[positive])
        if slope > 0 if form.is_loss else slope < 0:
            raise ValueError(f"{form.value} gets worse with {form.columns[0]}, so that no law of scale holds")


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Returns slope and height of the line of least squares."""
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx * dx).sum())
    return slope, float(y.mean() - slope * x.mean())


def _minimize(form: Form, starts: Array, x: Array, y: Array, scale: float | None) -> tuple[Array, Array]:
    """Fits a form by Levenberg-Marquardt, from each of B starts on its own.

    Args:
        form: The form with P parameters.
        starts: The starts [B, P].
        x: The places of the values.
        y: The values [B, n] that each start is fitted to.
        scale: Standard deviation of the scatter, for Huber's weights; None: least squares.

    Returns:
        The parameters [B, P] and their costs [B].
    """
    theta, count = np.array(starts, float), starts.shape[1]
    damping = np.full(len(theta), 1e-2)
    rest = form.value_of(theta, x) - y
    cost = _cost(rest, scale)
    for _ in range(ITERATIONS):
        # Huber's weights are 1 up to TUNING standard deviations, and fall beyond.
        weights = (
            np.ones_like(rest) if scale is None else np.minimum(1, TUNING * scale / np.maximum(np.abs(rest), 1e-300))
        )
        # Derivatives by differences, since a form states none.
        steps = 1e-6 * np.maximum(1.0, np.abs(theta))
        jacobian = np.empty((*rest.shape, count))
        for k in range(count):
            moved = theta.copy()
            moved[:, k] += steps[:, k]
            jacobian[:, :, k] = (form.value_of(moved, x) - form.value_of(theta, x)) / steps[:, k, None]
        weighted = jacobian * weights[:, :, None]
        normal = np.einsum("bnp,bnq->bpq", weighted, jacobian)
        gradient = np.einsum("bnp,bn->bp", weighted, rest)
        diagonal = np.einsum("bpp->bp", normal)
        damped = normal + (damping[:, None] * diagonal + 1e-12)[:, :, None] * np.eye(count)
        change = np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        # A step is bounded, since parameters are logarithms and exponents.
        tried = theta - np.clip(change, -2.0, 2.0)
        with np.errstate(all="ignore"):
            tried_rest = form.value_of(tried, x) - y
            tried_cost = np.where(np.isfinite(tried_rest).all(1), _cost(tried_rest, scale), np.inf)
        # Each start has its own damping: less after a step that helps, more after one that does not.
        better = tried_cost < cost
        theta[better], rest[better], cost[better] = tried[better], tried_rest[better], tried_cost[better]
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
    return theta, cost


def _cost(rest: Array, scale: float | None) -> Array:
    if scale is None:
        return (rest**2).sum(1)
    limit, size = TUNING * scale, np.abs(rest)
    return np.where(size <= limit, rest**2, 2 * limit * size - limit**2).sum(1)


def _joint(p: Array, x: Array) -> Array:
    # By logarithms, so that no parameter becomes negative and no power overflows.
    n, d = np.log(x)
    terms = [
        np.broadcast_to(p[:, :1], (len(p), x.shape[1])),
        p[:, 1:2] - p[:, 3:4] * n,
        p[:, 2:3] - p[:, 4:5] * d,
    ]
    return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])


def _joint_starts(x: Array, y: Array) -> Array:
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


def _power(p: Array, x: Array) -> Array:
    return np.logaddexp(np.broadcast_to(p[:, :1], (len(p), x.shape[1])), p[:, 1:2] - p[:, 2:3] * np.log(x[0]))


def _power_starts(x: Array, y: Array) -> Array:
    middle = np.log(x[0]).mean()
    floors = [share * y.min() for share in (0.05, 0.3, 0.6, 0.9)]
    heights = [np.log(max(y.mean() - floor, 1e-9)) for floor in floors]
    pairs = list(zip(floors, heights, strict=True))
    return np.asarray([[np.log(c), h + b * middle, b] for c, h in pairs for b in (0.05, 0.15, 0.4)])


def _sigmoid(p: Array, x: Array) -> Array:
    """Returns the values of a sigmoid.

    Its parameters are the logit of S0, the logit of the part of 1 - S0 that is won, the log of C_mid and the log of B.
    """
    first = _share(p[:, :1])
    # A point may have no compute; its score is then S0.
    slope, logs = np.exp(np.clip(p[:, 3:4], -20, 5)), np.log(np.maximum(x[0], 1e-300))
    return first + (1 - first) * _share(p[:, 1:2]) * _share(slope * (logs - p[:, 2:3]))


def _share(logits: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))


def _sigmoid_starts(x: Array, y: Array) -> Array:
    logs = np.log(x[0][x[0] > 0])
    low, high = np.clip((y.min(), y.max()), 1e-3, 1 - 1e-3)
    first, won = np.log(low / (1 - low)), np.log(max(high - low, 1e-3) / (1 - high))
    return np.asarray(
        [
            [first, won + rise, m, np.log(b)]
            for rise in (0.0, 1.5)
            for m in np.quantile(logs, (0.1, 0.5, 0.9))
            for b in (0.5, 1.0, 2.0)
        ]
    )


def _coverage(p: Array, x: Array) -> Array:
    return np.exp(-np.exp(np.clip(p[:, :1] - p[:, 1:2] * np.log(x[0]), -700, 700)))


def _coverage_starts(x: Array, y: Array) -> Array:
    logs, heights = np.log(x[0]), np.log(-np.log(np.clip(y, 1e-6, 1 - 1e-6)))
    dx = logs - logs.mean()
    slope = (dx * heights).sum() / max((dx * dx).sum(), 1e-300)
    return np.asarray([[heights.mean() - slope * logs.mean(), -slope], [heights.mean(), 0.3]])


def _published_joint(p: Array) -> dict[str, Array]:
    return {"E": np.exp(p[:, 0]), "A": np.exp(p[:, 1]), "B": np.exp(p[:, 2]), "alpha": p[:, 3], "beta": p[:, 4]}


def _published_power(p: Array) -> dict[str, Array]:
    return {"E": np.exp(p[:, 0]), "A": np.exp(p[:, 1]), "alpha": p[:, 2]}


def _published_sigmoid(p: Array) -> dict[str, Array]:
    first = _share(p[:, 0])
    last = first + (1 - first) * _share(p[:, 1])
    return {"S0": first, "S1": last, "C_mid": np.exp(p[:, 2]), "B": np.exp(np.clip(p[:, 3], -20, 5))}


def _published_coverage(p: Array) -> dict[str, Array]:
    return {"a": np.exp(p[:, 0]), "b": p[:, 1]}


PRETRAINING = Form(
    "pretraining",
    "loss = E + A/parameters^alpha + B/tokens^beta",
    ("parameters", "tokens"),
    "loss",
    5,
    _joint,
    _published_joint,
    _joint_starts,
)
FORMS = {
    form.name: form
    for form in (
        PRETRAINING,
        Form("compute", "loss = E + A/flops^alpha", ("flops",), "loss", 3, _power, _published_power, _power_starts),
        Form(
            "reinforcement",
            "score = S0 + (S1 - S0)/(1 + (C_mid/compute)^B)",
            ("compute",),
            "score",
            4,
            _sigmoid,
            _published_sigmoid,
            _sigmoid_starts,
        ),
        Form(
            "inference",
            "score = exp(-a/compute^b)",
            ("compute",),
            "score",
            2,
            _coverage,
            _published_coverage,
            _coverage_starts,
        ),
    )
}
