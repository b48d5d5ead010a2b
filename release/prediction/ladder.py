"""`atom ladder`: fits a law with its bands to runs, predicts the next run, and advises on the model for a budget.

It starts nothing. The advice counts serving: a model of N parameters costs 6 N D FLOPs to train on D tokens and 2 N T
to serve T tokens over its life, so the more it serves, the smaller and longer trained the best one is (Sardana et al.
2024, arXiv:2401.00448). For a mixture of experts, N counts the active parameters. These are FLOPs alone: servers that
wait, and batches that do not fill them, cost on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.text import short
from release.prediction.ladder_points import Point
from stages.evaluation import scaling_laws
from stages.evaluation.scaling_laws import COLUMNS, FORMULA, LEVEL, Array, Band, Fit, band, published

# Version of the form of ladder.json.
SCHEMA = 1
REPORT, PLOT = "ladder.json", "ladder.png"
# Places of the drawn law.
CURVE = 40
# Sizes with a color of their own in the plot; of more, all points have one.
MOST_SIZES = 6
# FLOPs of a parameter and token.
TRAIN, SERVE = 6.0, 2.0
# Sizes that are compared at once, and how often the search narrows to the neighbors of the best one.
GRID, ZOOMS = 200, 6


@dataclass(frozen=True)
class Choice:
    """A model.

    Attributes:
        parameters: N.
        tokens: D, the tokens of training.
        loss: Its loss by the law.
        training: FLOPs of its training.
        serving: FLOPs of serving it over its life.
    """

    parameters: float
    tokens: float
    loss: float
    training: float
    serving: float


@dataclass(frozen=True)
class Advice:
    """The model to train for a budget.

    Attributes:
        budget: FLOPs of training and serving.
        served: Tokens that it serves over its life.
        best: The model with the least loss of all that cost the budget.
        parameters: The band of its parameters.
        tokens: The band of its tokens.
        loss: The band of its loss.
        without_serving: The model that is optimal for its training alone and costs the budget as well.
        same_loss: The cheapest model with the loss of that one.
        saved: The share of the budget that the cheapest one saves.
    """

    budget: float
    served: float
    best: Choice
    parameters: Band
    tokens: Band
    loss: Band
    without_serving: Choice
    same_loss: Choice
    saved: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def advise(fit: Fit, budget: float, served: float) -> Advice:
    """Returns the advice of a fit.

    Args:
        fit: The law.
        budget: FLOPs of training and serving.
        served: Tokens to serve.

    Raises:
        ValueError: If serving a model of one parameter exceeds the budget.
    """
    if SERVE * served >= budget:
        raise ValueError(
            f"serving {served:.3g} tokens costs {SERVE * served:.3g} FLOPs for each parameter, and the budget is "
            f"{budget:.3g}; raise --budget"
        )
    # The law of the fit, and those of its refits, from which the bands follow.
    value, drawn = published(fit.parameters[None]), published(fit.draws)
    best = _choice(value, _best_size(value, budget, served)[0], budget, served)
    # The bands are those of the best models by the refits.
    drawn_sizes = _best_size(drawn, budget, served)
    plain = _compute_optimal(value, budget, served)
    cheap = _cheapest(value, plain.loss, served)
    return Advice(
        budget=budget,
        served=served,
        best=best,
        parameters=band(best.parameters, drawn_sizes),
        tokens=band(best.tokens, _tokens(drawn_sizes, budget, served)),
        loss=fit.predict((best.parameters, best.tokens)),
        without_serving=plain,
        same_loss=cheap,
        saved=1 - (cheap.training + cheap.serving) / budget,
    )


def _loss(law: dict[str, Array], sizes: Array, tokens: Array) -> Array:
    """Returns the losses of laws [B] at sizes and tokens [B, G], [B, G]."""
    e, a, b, alpha, beta = (law[name][:, None] for name in ("E", "A", "B", "alpha", "beta"))
    return e + a * sizes**-alpha + b * tokens**-beta


def _tokens(sizes: Array, budget: float, served: float) -> Array:
    """Returns the tokens of training that the budget pays for after serving."""
    return (budget - SERVE * sizes * served) / (TRAIN * sizes)


def _choice(law: dict[str, Array], size: float, budget: float, served: float) -> Choice:
    tokens = float(_tokens(size, budget, served))
    loss = float(_loss(law, np.asarray([[size]]), np.asarray([[tokens]]))[0, 0])
    return Choice(float(size), tokens, loss, TRAIN * size * tokens, SERVE * size * served)


def _best_size(law: dict[str, Array], budget: float, served: float) -> Array:
    """Returns the size with the least loss for each law, [B]."""
    # From one parameter up to the size that leaves one token of training for each parameter.
    largest = budget / (SERVE * served + TRAIN)
    count = len(law["E"])

    def cost(sizes: Array) -> Array:
        return _loss(law, sizes, _tokens(sizes, budget, served))

    return _least(cost, np.zeros(count), np.full(count, np.log(largest)))


def _least(cost: Any, low: Array, high: Array) -> Array:
    """Returns e to the argument between low and high [B] at which the cost ([B, G] -> [B, G]) is least, [B]."""
    # The cost has one valley, so the least one of a grid encloses it with its neighbors.
    for _ in range(ZOOMS):
        # Sizes are compared on a logarithmic scale.
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, GRID)
        place = np.argmin(cost(np.exp(grid)), axis=1)
        rows = np.arange(len(grid))
        low, high = grid[rows, np.maximum(place - 1, 0)], grid[rows, np.minimum(place + 1, GRID - 1)]
    return np.exp((low + high) / 2)


def frontier(fit: Fit, flops: Array) -> tuple[Array, Array, Array]:
    """Returns value, low and high of the least loss that training FLOPs buy, all [n]."""
    value, drawn = published(fit.parameters[None]), published(fit.draws)

    def least(law: dict[str, Array]) -> Array:
        losses = []
        for budget in flops:
            sizes = _best_size(law, float(budget), 0.0)[:, None]
            losses.append(_loss(law, sizes, _tokens(sizes, float(budget), 0.0))[:, 0])
        return np.stack(losses, axis=1)

    curve, low_high = least(value)[0], least(drawn)
    bands = [band(float(middle), low_high[:, n]) for n, middle in enumerate(curve)]
    return curve, np.asarray([row.low for row in bands]), np.asarray([row.high for row in bands])


def _compute_optimal(law: dict[str, Array], budget: float, served: float) -> Choice:
    """Returns the model that is optimal for its training FLOPs alone, and whose whole life costs the budget."""
    # Its cost rises with the FLOPs of training, so bisection finds them.
    low, high = np.log(1e-9 * budget), np.log(budget)
    # After a hundred halvings, fp64 tells the two ends apart no more.
    for _ in range(100):
        middle = (low + high) / 2
        size = _best_size(law, float(np.exp(middle)), 0.0)[0]
        is_above = np.exp(middle) + SERVE * size * served > budget
        low, high = (low, middle) if is_above else (middle, high)
    return _choice(law, float(_best_size(law, float(np.exp(low)), 0.0)[0]), budget, served)


def _cheapest(law: dict[str, Array], loss: float, served: float) -> Choice:
    """Returns the model of a loss whose life costs least."""
    # From L = E + A / N^alpha + B / D^beta: below this size, no number of tokens reaches the loss.
    e, a, b, alpha, beta = (float(law[name][0]) for name in ("E", "A", "B", "alpha", "beta"))
    smallest = (a / (loss - e)) ** (1 / alpha)

    def tokens(sizes: Array) -> Array:
        return (b / (loss - e - a * sizes**-alpha)) ** (1 / beta)

    def cost(sizes: Array) -> Array:
        return sizes * (TRAIN * tokens(sizes) + SERVE * served)

    # Just above it: a model of the smallest size would need infinitely many tokens.
    low = np.log(smallest) + 1e-6
    size = _least(cost, np.asarray([low]), np.asarray([low + 20.0]))[0]
    read = float(tokens(size))
    return Choice(float(size), read, loss, TRAIN * size * read, SERVE * size * served)


# Compute, the value there, and its band.
Points = list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Drawing:
    """The content of the plot.

    Attributes:
        title: Above it.
        unit: The compute of the x axis.
        label: The name of the law.
        law: Its curve.
        runs: The points of the fit, by label.
        predicted: The runs that are predicted, by label.
    """

    title: str
    unit: str
    label: str
    law: Points
    runs: Mapping[str, Points]
    predicted: Mapping[str, Points]


@dataclass(frozen=True)
class Expectation:
    """A run that is predicted.

    Attributes:
        name: Its name.
        figures: Its compute, by the columns of the law.
        band: The predicted value.
        remarks: Sentences on how far it extrapolates.
    """

    name: str
    figures: Mapping[str, float]
    band: Band
    remarks: Sequence[str]


@dataclass(frozen=True)
class Ladder:
    """The result of `atom ladder`.

    Attributes:
        points: The runs.
        fit: The law.
        expectations: The runs that are predicted.
        advice: The model to train for a budget.
        remarks: Sentences on how far the advice extrapolates.
    """

    points: Sequence[Point]
    fit: Fit
    expectations: Sequence[Expectation] = ()
    advice: Advice | None = None
    remarks: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "formula": FORMULA,
            "level": LEVEL,
            "points": [{"name": point.name, **point.figures} for point in self.points],
            "fit": {name: asdict(row) for name, row in self.fit.published().items()},
            "residual": self.fit.rms,
            "predictions": [
                {"name": row.name, **row.figures, "loss": asdict(row.band), "remarks": list(row.remarks)}
                for row in self.expectations
            ],
            "advice": None if self.advice is None else self.advice.to_json() | {"remarks": list(self.remarks)},
        }


def make(
    points: Sequence[Point],
    following: Sequence[tuple[str, Mapping[str, float]]] = (),
    budget: float | None = None,
    served: float = 0.0,
) -> Ladder:
    """Fits a law to points, and answers by it.

    Args:
        points: The runs.
        following: (name, figures) of runs to predict.
        budget: FLOPs of training and serving to advise on.
        served: Tokens to serve.

    Raises:
        AtomError: If the points cannot carry the law, or it cannot answer.
    """
    try:
        columns = [[point.figures[name] for point in points] for name in COLUMNS]
        fit = scaling_laws.fit(columns, [point.figures["loss"] for point in points])
        advice = None if budget is None else advise(fit, budget, served)
    except ValueError as error:
        raise AtomError(f"these {len(points)} points carry no answer: {error}") from None
    # A prediction far from the runs is marked, and not refused.
    expectations = [
        Expectation(name, figures, fit.predict([figures[column] for column in COLUMNS]), fit.extrapolates(figures))
        for name, figures in following
    ]
    remarks = [] if advice is None else fit.extrapolates(asdict(advice.best))
    return Ladder(points, fit, expectations, advice, remarks)


def write(ladder: Ladder, plot: bytes, folder: Path) -> None:
    """Writes REPORT and PLOT into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write(folder / REPORT, json.dumps(ladder.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n")
    atomic_files.write(folder / PLOT, plot)


def sentences(ladder: Ladder) -> list[str]:
    """Returns the lines that the command prints."""
    fit = ladder.fit
    lines = [f"{FORMULA}, fitted to {len(ladder.points)} points; bands of {LEVEL:.0%}"]
    lines += [f"  {name} = {_figure(row)}" for name, row in fit.published().items()]
    lines.append(f"  residual: {fit.rms:.2%} of the loss")
    for row in ladder.expectations:
        at = ", ".join(f"{short(row.figures[name])} {name}" for name in COLUMNS)
        lines.append(f"{row.name} ({at}): loss {_figure(row.band)}")
        lines += [f"  {remark}" for remark in row.remarks]
    if (advice := ladder.advice) is not None:
        lines += _advice(advice)
        lines += [f"  {remark}" for remark in ladder.remarks]
    return lines


def _advice(advice: Advice) -> list[str]:
    best, plain, cheap = advice.best, advice.without_serving, advice.same_loss
    lines = [
        f"{advice.budget:.3g} FLOPs for training and for serving {short(advice.served)} tokens:",
        f"  train {short(best.parameters)} parameters ({short(advice.parameters.low)} to "
        f"{short(advice.parameters.high)}) on {short(best.tokens)} tokens ({short(advice.tokens.low)} to "
        f"{short(advice.tokens.high)}), {best.tokens / best.parameters:.3g} for each parameter",
        f"  loss {_figure(advice.loss)}; serving is {best.serving / advice.budget:.0%} of the cost",
    ]
    # Without serving, the three models are one.
    if advice.served:
        lines.append(
            f"  a model that is optimal for its training alone ({short(plain.parameters)} parameters, "
            f"{short(plain.tokens)} tokens) costs as much and has a loss of {plain.loss:.4f}; "
            f"{short(cheap.parameters)} parameters on {short(cheap.tokens)} tokens have it for {advice.saved:.1%} less"
        )
    return lines


def _figure(row: Band) -> str:
    return f"{row.value:.5g} ({row.low:.5g} to {row.high:.5g})"


def drawing(ladder: Ladder) -> Drawing:
    """Returns the points, the least loss that compute buys by the law, with its band, and the predictions.

    Compute is 6 N D.
    """
    at = [(_compute(point.figures), point.figures["loss"]) for point in ladder.points]
    predicted = {
        f"{row.name}, predicted": [(_compute(row.figures), row.band.value, row.band.low, row.band.high)]
        for row in ladder.expectations
    }
    shown = [x for x, _ in at] + [points[0][0] for points in predicted.values()]
    # From the smallest run to the largest one, predicted ones included.
    grid = np.geomspace(min(shown), max(shown), CURVE)
    values = frontier(ladder.fit, grid)
    runs = {label: [(x, y, y, y) for x, y in sorted(rows)] for label, rows in _groups(ladder, at).items()}
    unit = "training FLOPs, 6 N D"
    return Drawing(
        title=f"loss by {unit}, with {LEVEL:.0%} bands",
        unit=unit,
        label="least loss for the compute",
        law=[(float(a), float(b), float(c), float(d)) for a, b, c, d in zip(grid, *values, strict=True)],
        runs=runs,
        predicted=predicted,
    )


def _compute(figures: Mapping[str, float]) -> float:
    return TRAIN * math.prod(figures[name] for name in COLUMNS)


def _groups(ladder: Ladder, at: Sequence[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Returns the points by their size, if sizes are few."""
    sizes = [point.figures["parameters"] for point in ladder.points]
    if len(set(sizes)) > MOST_SIZES:
        return {"runs": list(at)}
    groups: dict[str, list[tuple[float, float]]] = {}
    for size, row in sorted(zip(sizes, at, strict=True)):
        groups.setdefault(f"{short(size)} parameters", []).append(row)
    return groups
