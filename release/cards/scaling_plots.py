"""The plots of scores: after each phase, and two scaling plots: more answers to a question, more reinforcement
learning.

Each function returns the bytes of a PNG, equal for one version of matplotlib and its fonts. The data are read from
artifacts: scores.json of stage `solve`, training.jsonl of stage `rlvr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release.assembly import training
from release.assembly.model_facts import ModelFacts
from release.cards import tables
from release.cards.plot import COLORS, Drawings, png
from stages.evaluation.confidence import Z95
from stages.evaluation.scores import pass_at_1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = PROGRESS, INFERENCE, REINFORCEMENT = "progress.png", "inference.png", "reinforcement.png"
MARKERS = "osv^P*Xd<>"
LABEL_STEP = 0.055
"""The least distance of two labels, as a share of the axis."""


def model_plots(folder: Path, model: ModelFacts) -> Drawings:
    """The plots of a model repository, by name; those of conversation only for a model with chat.

    model: its facts, with the scores to draw.
    """
    plots: Drawings = {PROGRESS: lambda: progress(model)}
    if scores := {name: row for name, row in model.chat.get("test", {}).items() if row["problems_all"]}:
        plots[INFERENCE] = lambda: inference(scores)
    if logs := {phase: path for phase, path in training.logs(folder).items() if phase == "rlvr"}:
        plots[REINFORCEMENT] = lambda: reinforcement({name: training.read(path) for name, path in logs.items()})
    return plots


def progress(model: ModelFacts) -> bytes:
    """Bits per byte of held-out text and the share of right answers after each phase, with 95 % intervals."""
    names, test = list(model.scores), model.chat.get("test", {})
    right = {"in plain text, greedy": {name: row["accuracy_all"] for name, row in model.scores.items()}}
    if drawn := pass_at_1(test):
        right["in conversation, drawn (pass@1)"] = dict(drawn)
    bits = {"": {name: row["bits_per_byte_all"] for name, row in model.scores.items()}}
    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("Text: bits per byte, lower is better", "bits per byte", bits),
        ("Problems: share of right answers", "share right", right),
    ]

    def paint(figure: Figure) -> None:
        for axis, (heading, unit, series) in zip(figure.subplots(1, 2), panels, strict=True):
            labels = []
            for color, (name, points) in zip(COLORS, series.items(), strict=False):
                places = [names.index(model_name) for model_name in points]
                values = [row["value"] for row in points.values()]
                errors = [Z95 * row["se"] for row in points.values()]
                axis.errorbar(
                    places,
                    values,
                    errors,
                    color=color,
                    marker="o",
                    markersize=4,
                    linewidth=1.2,
                    elinewidth=1,
                    capsize=2,
                )
                labels.append((places[0], values[0], name, color))
            _panel(axis, heading, unit)
            axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the names
            axis.set_xticks(range(len(names)), list(tables.titles(names).values()), rotation=30, ha="right")
            axis.set_xlim(-0.3, len(names) - 0.7)
            if len(labels) > 1:
                for number, (_, _, name, color) in enumerate(labels):
                    axis.annotate(
                        name, (0.02, 0.98 - 0.08 * number), xycoords="axes fraction", va="top", fontsize=8, color=color,
                        weight="bold",
                    )  # fmt: skip

    return png((8.4, 3.4), paint)


def inference(scores: Mapping[str, Any], kind: str | None = None) -> bytes:
    """Accuracy against generated tokens for each problem, on a logarithmic axis: a panel for pass@k and one for maj@k,
    with 95 % intervals, and the greedy answer as one point.

    scores: scores.json of each model by name; kind: of the problems, all without one.
    """

    def paint(figure: Figure) -> None:
        for axis, (metric, meaning) in zip(figure.subplots(1, 2, sharey=True), MEANINGS.items(), strict=True):
            ends = []
            for color, marker, (name, model_scores) in zip(
                _colors(scores), _markers(scores), scores.items(), strict=True
            ):
                part = model_scores["problems_all"] if kind is None else model_scores["problems"][kind]
                ks = sorted(part["at"], key=int)
                points = [part["at"][k][metric] for k in ks]
                tokens = [part["at"][k]["tokens"] for k in ks]
                values, errors = [p["value"] for p in points], [Z95 * p["se"] for p in points]
                axis.errorbar(
                    tokens, values, errors, color=color, marker=marker, markersize=4, linewidth=1, elinewidth=0.6
                )
                greedy = part["greedy"]
                place = greedy["tokens"], greedy["accuracy"]["value"]
                axis.plot(*place, color=color, marker="D", markersize=6, mfc="none", linestyle="none")
                ends.append((values[-1], tables.title(name), color))
            axis.set_xscale("log")
            subject = "all problems" if kind is None else kind
            _panel(axis, f"{meaning}, {subject}", "share right" if metric == "pass" else "")
            axis.set_xlabel("generated tokens for a problem (diamond: greedy)")
            _plain_ticks(axis)
            top = min(1.02, 1.3 * axis.get_ylim()[1])
            axis.set_ylim(-0.02 * top, top)
            _label_ends(axis, ends)

    return png((8.4, 3.8), paint)


MEANINGS = {"pass": "pass@k: one of k is right", "maj": "maj@k: the most frequent is right"}


def reinforcement(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Validation accuracy by kind against the tokens generated for training.

    logs: the lines of training.jsonl of each run by name; those with `validation` and `generated` are drawn.
    """

    def paint(figure: Figure) -> None:
        axis = figure.add_subplot()
        kinds = {
            name: sorted({kind for x in lines for kind in x.get("validation", {})}) for name, lines in logs.items()
        }
        curves = [(name, kind) for name in logs for kind in kinds[name]]
        ends = []
        for color, marker, (name, kind) in zip(_colors(curves), _markers(curves), curves, strict=True):
            measured = [x for x in logs[name] if kind in x.get("validation", {}) and "generated" in x]
            tokens = [x["generated"] for x in measured]
            values = [x["validation"][kind] for x in measured]
            axis.plot(tokens, values, color=color, marker=marker, markersize=4, linewidth=1)
            run = f"{name}, " if len(logs) > 1 else ""
            ends += [(values[-1], f"{run}{kind}", color)] if tokens else []
        axis.set_ylim(-0.02, 1.02)
        _panel(axis, "Validation problems during reinforcement learning, greedy", "mean reward")
        axis.set_xlabel("tokens generated in training (the log has no errors of these means)")
        _label_ends(axis, ends)

    return png((7.0, 3.8), paint)


def _colors(series: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    return [COLORS[n % len(COLORS)] for n in range(len(series))]


def _markers(series: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    return [MARKERS[n % len(MARKERS)] for n in range(len(series))]


def _panel(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)


def _plain_ticks(axis: Axes) -> None:
    """Writes the ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import LogFormatter

    axis.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    axis.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axis.tick_params(axis="x", which="minor", labelsize=8)


def _label_ends(axis: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes the name of each curve beside its end, no two of them over each other. ends: value, name, color."""
    bottom, top = axis.get_ylim()
    step = LABEL_STEP * (top - bottom)
    low, places = bottom - step, []
    for y, name, color in sorted(ends, key=lambda end: end[0]):
        low = max(low + step, y)
        places.append((low, name, color))
    shift = max(0.0, places[-1][0] - top) if places else 0.0
    for y, name, color in places:
        axis.annotate(
            name, (1.0, y - shift), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            fontsize=8, color=color, va="center", annotation_clip=False, weight="bold",
        )  # fmt: skip
