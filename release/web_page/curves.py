"""The curves of every phase, from its log, and the scaling axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from release.assembly import training
from release.assembly.model_facts import ModelFacts
from release.assembly.published_tables import read_json
from release.layout import order_of, when
from release.prediction.forecast import LOSS
from release.web_page.charts import Series, chart
from stages.evaluation.confidence import Z95

BUCKETS = 120
"""Points of a curve; each is the mean of successive values, with the smallest and the largest."""
LADDER_PLACES = 40
"""Places of the drawn law of a prediction, less one."""
LEFT_OUT = ("step", "tokens", "experts", "spike", "skipped", "excluded", "generated", "policy", "consumed", "round")
TITLES = {
    "loss": ("Training loss", "nats per token"),
    "heldout_loss": ("Held-out loss", "nats per token, of documents that training does not read"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "rewards": ("Reward by kind of task", "mean of the sampled answers"),
    "reward": ("Reward", "mean of the sampled answers"),
    "validation": ("Validation", "mean reward of greedy answers"),
    "expert_max_violation": ("Balance of experts", "the busiest one's tokens over a fair share, less 1"),
    "router_entropy": ("Entropy of the routers", "nats; high: tokens spread over all experts"),
    "aux_loss": ("Load-balancing loss", "before its weight"),
}
"""{field of a log: title, explanation}; the others are shown after these, by name."""


@dataclass
class Curve:
    """A curve in at most BUCKETS points, whatever its length. width: steps of a point."""

    width: int = 1
    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        self._merge(step // self.width, [1, step, value, value, value])
        if len(self.sums) > BUCKETS:
            self.width *= 2
            rows, self.sums = self.sums, {}
            for number, row in rows.items():
                self._merge(number // 2, row)

    def _merge(self, number: int, row: list[float]) -> None:
        if (known := self.sums.get(number)) is None:
            self.sums[number] = row
            return
        for n in range(3):
            known[n] += row[n]
        known[3], known[4] = min(known[3], row[3]), max(known[4], row[4])

    def points(self) -> list[tuple[float, float, float, float]]:
        return [(row[1] / row[0], row[2] / row[0], row[3], row[4]) for _, row in sorted(self.sums.items())]


@dataclass
class PhaseCurves:
    """What the page shows of the log of a phase. groups: curves by chart and line. experts: the line with the last
    measurement of the experts. heldout: (tokens, held-out loss). validation: (generated tokens, value) by kind."""

    groups: dict[str, dict[str, Curve]] = field(default_factory=dict)
    experts: dict[str, Any] | None = None
    tokens: int = 0
    heldout: list[tuple[float, float]] = field(default_factory=list)
    validation: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def read_curves(log: Path) -> PhaseCurves:
    """Reads a log once."""
    phase = PhaseCurves()
    for line in training.stream(log):
        for name, value in line.items():
            if name not in LEFT_OUT:
                for group, label, number in _numbers(name, value):
                    phase.groups.setdefault(group, {}).setdefault(label, Curve()).add(line["step"], number)
        phase.experts = line if "experts" in line else phase.experts
        phase.tokens = line.get("tokens", phase.tokens)
        if "heldout_loss" in line:
            _append(phase.heldout, (phase.tokens, line["heldout_loss"]))
        if "generated" in line:
            for kind, value in line.get("validation", {}).items():
                _append(phase.validation.setdefault(kind, []), (line["generated"], value))
    return phase


def _append(points: list[tuple[float, float]], point: tuple[float, float]) -> None:
    """Adds a point to those of an axis; each second one goes where there are too many, never the last."""
    points.append(point)
    if len(points) > 2 * BUCKETS:
        del points[-2::-2]


def phase_charts(phase: PhaseCurves) -> list[Markup]:
    """The charts of a phase: of each field of its log that is a number, and of each group of numbers."""
    rank = {name: number for number, name in enumerate(TITLES)}
    charts = []
    for group in sorted(phase.groups, key=lambda name: (rank.get(name, len(rank)), name)):
        title, unit = TITLES.get(group, (group.replace("_", " ").replace(".", ", "), ""))
        series = [Series(label or title, curve.points()) for label, curve in sorted(phase.groups[group].items())]
        charts.append(chart(title, series, "step", unit))
    return charts


def _numbers(name: str, value: Any) -> Iterator[tuple[str, str, float]]:
    """(chart, line, number) of a field; a group of groups is one chart for each of them."""
    if isinstance(value, dict):
        for label, item in value.items():
            if isinstance(item, dict):
                yield from ((f"{name}.{label}", part, number) for _, part, number in _numbers(name, item))
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                yield name, label, item
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, "", value


def expert_table(phase: PhaseCurves) -> tuple[int, list[tuple[int, list[float]]]] | None:
    """The step of the last measurement of the experts, and for each layer the load of each expert, of which 1 is a fair
    share; None without one."""
    if phase.experts is None:
        return None
    rows = zip(phase.experts["experts"]["layers"], phase.experts["experts"]["share"], strict=True)
    return phase.experts["step"], [(layer, [share * len(row) for share in row]) for layer, row in rows]


def text_axis(phases: Mapping[str, PhaseCurves]) -> Markup:
    """Held-out loss against the tokens of all phases with such a loss so far; each phase measures its own mix."""
    start, series = 0, []
    for name, phase in phases.items():
        if order_of(name) != name:
            continue
        series.append(Series(name, _plain((start + tokens, loss) for tokens, loss in phase.heldout)))
        start += phase.tokens if phase.heldout else 0
    return chart("More text: held-out loss", series, "tokens trained on, all phases so far", "nats per token")


def sizes_axis(phases: Mapping[str, PhaseCurves], names: Iterable[str]) -> Markup:
    """Held-out loss of the named phases against their tokens: those of models of several sizes on the same rows."""
    series = [Series(name, _plain(phases[name].heldout)) for name in names if name in phases]
    return chart("A larger model on the same rows: held-out loss", series, "tokens trained on", "nats per token")


def reinforcement_axis(phases: Mapping[str, PhaseCurves]) -> Markup:
    """Validation against the tokens that a phase generated."""
    series = [
        Series(f"{name}, {kind}", _plain(points))
        for name, phase in phases.items()
        for kind, points in phase.validation.items()
    ]
    return chart("More reinforcement learning: validation", series, "tokens generated in the phase", "greedy answers")


def inference_axis(evaluation: Path) -> Markup:
    """pass@k and maj@k against generated tokens, with intervals of 95 %."""
    paths = {path.parent.name: path for path in evaluation.glob("*/scores.json")}
    series = []
    for model in sorted(paths, key=when):
        at = (read_json(paths[model])["problems_all"] or {}).get("at", {})
        for metric in ("pass", "maj"):
            points = []
            for k in sorted(at, key=int):
                value, half = at[k][metric]["value"], Z95 * at[k][metric]["se"]
                points.append((at[k]["tokens"], value, max(0.0, value - half), min(1.0, value + half)))
            series.append(Series(f"{model}, {metric}@k", points))
    return chart("More answers: share of problems right", series, "tokens generated for a problem", "", True)


def ladder_axis(models: Iterable[ModelFacts]) -> Markup:
    """Held-out loss against training FLOPs of the runs that a prediction is made from, its law from the least run to
    the predicted one, its band there, and what was measured; empty without a prediction."""
    for model in models:
        if (prediction := model.prediction) is None:
            continue
        (forecast,) = (row for row in prediction.forecasts if row.figure == LOSS)
        runs, target, law = prediction.points, prediction.target.flops, forecast.law
        least = min(point.flops for point in runs)
        grid = [least * (target / least) ** (n / LADDER_PLACES) for n in range(LADDER_PLACES + 1)]
        series = [
            Series("law of the runs", _plain((x, law["a"] * x ** -law["b"] + law["c"]) for x in grid)),
            Series("runs", _plain((point.flops, point.heldout_loss) for point in runs), dots=True),
            Series("predicted", [(target, forecast.value, forecast.low, forecast.high)], dots=True),
        ]
        measured = [(target, row.measured) for row in model.outcomes if row.forecast.figure == LOSS]
        series.append(Series("measured", _plain(measured), dots=True))
        return chart("Larger runs: held-out loss", series, "training FLOPs", "nats per token; bar: 90 %", True)
    return Markup()


def _plain(points: Iterable[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    return [(x, y, y, y) for x, y in points if math.isfinite(y)]
