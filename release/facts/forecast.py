"""A prediction: the runs that it is made from, what follows from them, and the comparison with a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release import untrusted

SCHEMA = 1
FILE = "prediction.json"
FOLDER = "evidence/prediction"
"""The folder in a release of FILE, its manifest.json and its statement.json. The model's repository has FILE, too."""
LEAST_RUNS, LEVEL = 3, 0.9
"""Runs that a law needs, and the share of a band."""
PHASE, MODEL = "pretrain", "base"
"""The phase after which the model is predicted, and the name of that model."""
LOSS, BITS, ACCURACY = "heldout_loss", "bits_per_byte_all", "accuracy_all"
NAMES = {LOSS: "held-out loss", BITS: "bits per byte, all sources", ACCURACY: "accuracy, all tasks"}


@dataclass(frozen=True)
class RunSize:
    """A run, or the one to come.

    Attributes:
        recipe: Name of its recipe.
        key: Key of its pre-training.
        flops: `tokens` times the FLOPs of training one token.
        tokens: Slots of all steps.
        active: Active parameters.
    """

    recipe: str
    key: str
    flops: float
    tokens: int
    active: int


@dataclass(frozen=True)
class Point(RunSize):
    """A finished run.

    Attributes:
        digest: Digest of its pre-training.
        scores_key: Key of its model's evaluation.
        scores_digest: Digest of that evaluation.
        heldout_loss: The last one of `summary.json`.
        bits_per_byte_all: Of `scores.json`: on the held-out documents of all sources.
        accuracy_all: Of `scores.json`: on all problems.
        items: The number of these problems.
    """

    digest: str
    scores_key: str
    scores_digest: str
    heldout_loss: float
    bits_per_byte_all: float
    accuracy_all: float
    items: int


@dataclass(frozen=True)
class Forecast:
    """The expectation of one figure.

    Attributes:
        figure: `heldout_loss`, `bits_per_byte_all` or `accuracy_all`.
        law: The parameters of the fitted law.
        value: The expected value.
        low: The lower end of its band.
        high: The upper end of its band.
    """

    figure: str
    law: dict[str, float]
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    target: RunSize
    points: tuple[Point, ...]
    forecasts: tuple[Forecast, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "phase": PHASE,
            "model": MODEL,
            "level": LEVEL,
            "target": asdict(self.target),
            "points": [asdict(point) for point in self.points],
            "forecasts": [asdict(row) for row in self.forecasts],
        }


@dataclass(frozen=True)
class Outcome:
    """A forecast and what was measured."""

    forecast: Forecast
    measured: float

    @property
    def within(self) -> bool:
        return self.forecast.low <= self.measured <= self.forecast.high


def predict(target: RunSize, points: Sequence[Point]) -> Prediction:
    """Returns the prediction for a run from finished ones.

    Raises ValueError with a sentence if they cannot carry one.
    """
    from stages.evaluation import scaling_laws

    # Equal input gives an equal prediction, in whatever order the runs were named.
    ordered = sorted(points, key=lambda point: (point.flops, point.key))
    sizes = sorted({point.flops for point in ordered})
    if len(sizes) < LEAST_RUNS:
        raise ValueError(f"the runs have {len(sizes)} amounts of compute, and a law needs {LEAST_RUNS}")
    # A prediction is about a larger run than those that it is made from.
    if sizes[-1] >= target.flops:
        raise ValueError(
            f"{ordered[-1].recipe} has {sizes[-1]:.3g} training FLOPs, not fewer than {target.recipe} with "
            f"{target.flops:.3g}"
        )
    flops, forecasts = [point.flops for point in ordered], []
    for figure in (LOSS, BITS):
        law, band = scaling_laws.loss_band(flops, [getattr(point, figure) for point in ordered], target.flops)
        forecasts.append(Forecast(figure, law, **asdict(band)))
    # The uncertainty of the smallest evaluation.
    items = min(point.items for point in ordered)
    accuracies = [point.accuracy_all for point in ordered]
    curve, band = scaling_laws.accuracy_band(flops, accuracies, items, target.flops)
    forecasts.append(Forecast(ACCURACY, curve, **asdict(band)))
    return Prediction(target, tuple(ordered), tuple(forecasts))


def read(path: Path) -> Prediction:
    """Reads a published prediction. Raises CheckFailed if it is malformed."""
    body = untrusted.read_json(path)
    try:
        if (body["schema"], body["phase"], body["model"], body["level"]) != (SCHEMA, PHASE, MODEL, LEVEL):
            raise ValueError(f"it is not of schema {SCHEMA}, or about another phase, model or level")
        return Prediction(
            RunSize(**body["target"]),
            tuple(Point(**row) for row in body["points"]),
            tuple(Forecast(**row) for row in body["forecasts"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckFailed(f"{path.name} is no prediction: {error}") from None


def outcomes(prediction: Prediction, measured: Mapping[str, float]) -> list[Outcome]:
    """Compares the forecasts with the measured values, which are given by figure.

    Forecasts of a figure that was not measured are left out.
    """
    return [Outcome(row, measured[row.figure]) for row in prediction.forecasts if row.figure in measured]
