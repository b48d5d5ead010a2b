"""What a ladder of runs says: the law with its bands, the next run before it is run, and what to train for a budget.

It fits and predicts what others ran or will run, and starts nothing.
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
from release.prediction import lifetime
from release.prediction.ladder_points import Point
from release.prediction.lifetime import TRAIN, Advice
from stages.evaluation import ladder_laws
from stages.evaluation.ladder_laws import LEVEL, PRETRAINING, Fit, Form
from stages.evaluation.scaling_law import Band

SCHEMA = 1
REPORT, PLOT = "ladder.json", "ladder.png"
CURVE = 40
"""Places of the drawn law."""
MOST_SIZES = 6
"""Sizes with a color of their own in the plot; of more, all points have one."""


Points = list[tuple[float, float, float, float]]
"""Compute, the value there, and its band."""


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
    """A run that is predicted. remarks: how it extrapolates."""

    name: str
    figures: Mapping[str, float]
    band: Band
    remarks: Sequence[str]


@dataclass(frozen=True)
class Ladder:
    """advice: only of the law `pretraining`. remarks: on the advice."""

    points: Sequence[Point]
    fit: Fit
    expectations: Sequence[Expectation] = ()
    advice: Advice | None = None
    remarks: Sequence[str] = field(default=())

    @property
    def form(self) -> Form:
        return self.fit.form

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "law": self.form.name,
            "formula": self.form.formula,
            "level": LEVEL,
            "points": [{"name": point.name, **point.figures} for point in self.points],
            "fit": {name: asdict(row) for name, row in self.fit.published().items()},
            "residual": self.fit.rms,
            "predictions": [
                {"name": row.name, **row.figures, self.form.value: asdict(row.band), "remarks": list(row.remarks)}
                for row in self.expectations
            ],
            "advice": None if self.advice is None else self.advice.to_json() | {"remarks": list(self.remarks)},
        }


def make(
    form: Form,
    points: Sequence[Point],
    following: Sequence[tuple[str, Mapping[str, float]]] = (),
    budget: float | None = None,
    served: float = 0.0,
) -> Ladder:
    """following: (name, figures) of runs to predict. budget: FLOPs of training and serving; served: tokens.

    Raises AtomError with a sentence if the points cannot carry the law, or it cannot answer.
    """
    if budget is not None and form is not PRETRAINING:
        raise AtomError(f"--budget asks for parameters and tokens, and the law {form.name} has none; leave it out")
    try:
        fit = ladder_laws.fit(
            form,
            [[point.figures[name] for point in points] for name in form.columns],
            [point.figures[form.value] for point in points],
        )
        advice = None if budget is None else lifetime.advise(fit, budget, served)
    except ValueError as error:
        raise AtomError(f"these {len(points)} points carry no answer: {error}") from None
    expectations = [
        Expectation(name, figures, fit.predict([figures[column] for column in form.columns]), fit.extrapolates(figures))
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
    """What the command prints."""
    form, fit = ladder.form, ladder.fit
    lines = [f"{form.formula}, fitted to {len(ladder.points)} points; bands of {LEVEL:.0%}"]
    lines += [f"  {name} = {_figure(row)}" for name, row in fit.published().items()]
    lines.append(f"  residual: {fit.rms:.2%} of the loss" if form.is_loss else f"  residual: {fit.rms:.4f}")
    for row in ladder.expectations:
        at = ", ".join(f"{short(row.figures[name])} {name}" for name in form.columns)
        lines.append(f"{row.name} ({at}): {form.value} {_figure(row.band)}")
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
    """Returns the points, the law with its band, and what is predicted, by compute. For the law `pretraining` compute
    is 6 N D, and the line is the least loss that it buys."""
    form = ladder.form
    at = [(_compute(form, point.figures), point.figures[form.value]) for point in ladder.points]
    predicted = {
        f"{row.name}, predicted": [(x, row.band.value, row.band.low, row.band.high)]
        for row in ladder.expectations
        if (x := _compute(form, row.figures)) > 0
    }
    shown = [x for x, _ in at if x > 0] + [points[0][0] for points in predicted.values()]
    grid = np.geomspace(min(shown), max(shown), CURVE)
    values = lifetime.frontier(ladder.fit, grid) if form is PRETRAINING else ladder.fit.curve(grid[None])
    runs = {label: [(x, y, y, y) for x, y in sorted(rows) if x > 0] for label, rows in _groups(ladder, at).items()}
    unit = {"pretraining": "training FLOPs, 6 N D", "compute": "training FLOPs"}.get(form.name, "compute")
    return Drawing(
        title=f"{form.value} by {unit}, with {LEVEL:.0%} bands",
        unit=unit,
        label="least loss for the compute" if form is PRETRAINING else "law",
        law=[(float(a), float(b), float(c), float(d)) for a, b, c, d in zip(grid, *values, strict=True)],
        runs={label: points for label, points in runs.items() if points},
        predicted=predicted,
    )


def _compute(form: Form, figures: Mapping[str, float]) -> float:
    return (
        TRAIN * math.prod(figures[name] for name in form.columns) if form is PRETRAINING else figures[form.columns[0]]
    )


def _groups(ladder: Ladder, at: Sequence[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    """The points by their size, if the law has sizes and they are few."""
    sizes = [point.figures.get("parameters", 0.0) for point in ladder.points]
    if ladder.form is not PRETRAINING or len(set(sizes)) > MOST_SIZES:
        return {"runs": list(at)}
    groups: dict[str, list[tuple[float, float]]] = {}
    for size, row in sorted(zip(sizes, at, strict=True)):
        groups.setdefault(f"{short(size)} parameters", []).append(row)
    return groups
