"""The three scaling plots: more answers to a question, more reinforcement learning, more pre-training.

Each function returns the bytes of a PNG, equal for one version of matplotlib and its fonts. The data are read from
artifacts: scores.json of stage `solve`, training.jsonl of stage `rlvr`, the ladder's JSON of bench/ladder.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release.assembly import training
from release.assembly.model_facts import ModelFacts
from release.cards.plot import COLORS, DPI, require
from stages.evaluation.confidence import Z95

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def model_plots(folder: Path, model: ModelFacts) -> dict[str, bytes]:
    """The plots of a model repository, by name; none for a model without chat.

    model: its facts, with the scores to draw.
    """
    plots = {}
    if scores := {name: row for name, row in model.chat.get("test", {}).items() if row["problems_all"]}:
        plots["inference.png"] = inference(scores)
    logs = {phase: training.read(path) for phase, path in training.logs(folder).items() if phase == "rlvr"}
    if logs:
        plots["reinforcement.png"] = reinforcement(logs)
    return plots


def inference(scores: Mapping[str, Any], kind: str | None = None) -> bytes:
    """Accuracy against generated tokens for each problem, on a logarithmic axis: pass@k and maj@k with 95 % intervals,
    and the greedy answer as one point.

    scores: scores.json of each model by name; kind: of the problems, all without one.
    """

    def paint(axis: Axes) -> None:
        for color, (name, model_scores) in zip(_colors(scores), scores.items(), strict=True):
            part = model_scores["problems_all"] if kind is None else model_scores["problems"][kind]
            ks = sorted(part["at"], key=int)
            for metric, style in (("pass", "-"), ("maj", "--")):
                points = [part["at"][k][metric] for k in ks]
                tokens = [part["at"][k]["tokens"] for k in ks]
                values, errors = [p["value"] for p in points], [Z95 * p["se"] for p in points]
                axis.errorbar(
                    tokens, values, errors, color=color, linestyle=style, marker="o", markersize=3, linewidth=1,
                    elinewidth=0.6, label=f"{name}, {metric}@k",
                )  # fmt: skip
            greedy = part["greedy"]
            axis.plot(greedy["tokens"], greedy["accuracy"]["value"], color=color, marker="D", linestyle="none")
        axis.set_xscale("log")
        axis.set_ylim(-0.02, 1.02)
        subject = "all problems" if kind is None else kind
        _label_axes(
            axis, f"What more answers are worth: {subject} (diamond: greedy)", "generated tokens of a problem", "right"
        )

    return _png(paint)


def reinforcement(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Validation accuracy by kind against the tokens generated for training.

    logs: the lines of training.jsonl of each run by name; those with `validation` and `generated` are drawn.
    """

    def paint(axis: Axes) -> None:
        kinds = {
            name: sorted({kind for x in lines for kind in x.get("validation", {})}) for name, lines in logs.items()
        }
        curves = [(name, kind) for name in logs for kind in kinds[name]]
        for color, (name, kind) in zip(_colors(curves), curves, strict=True):
            measured = [x for x in logs[name] if kind in x.get("validation", {}) and "generated" in x]
            tokens = [x["generated"] for x in measured]
            values = [x["validation"][kind] for x in measured]
            axis.plot(tokens, values, color=color, marker="o", markersize=3, linewidth=1, label=f"{name}, {kind}")
        axis.set_ylim(-0.02, 1.02)
        _label_axes(axis, "Validation accuracy of greedy answers", "tokens generated in training", "mean reward")

    return _png(paint)


def pretraining(ladder: Mapping[str, Any]) -> bytes:
    """Held-out loss against pre-training FLOPs: every run, the fitted power law, and its bootstrap band.

    ladder: the output of bench/ladder.py: `runs` of flops, loss and size; `curve` of flops, loss, low and high; `law`.
    """

    def paint(axis: Axes) -> None:
        curve, runs, law = ladder["curve"], ladder["runs"], ladder["law"]
        axis.fill_between(curve["flops"], curve["low"], curve["high"], color="#cccccc", linewidth=0)
        label = f"{law['a']:.3g} · C^-{law['b']:.3g} + {law['c']:.3g}"
        axis.plot(curve["flops"], curve["loss"], color="#444444", linewidth=1, label=label)
        sizes = list(dict.fromkeys(run["size"] for run in runs))
        for color, size in zip(_colors(sizes), sizes, strict=True):
            size_runs = [run for run in runs if run["size"] == size]
            label = f"{size}, {size_runs[0]['tokens']:,} tokens"
            axis.plot(
                [run["flops"] for run in size_runs],
                [run["loss"] for run in size_runs],
                "o",
                color=color,
                markersize=4,
                label=label,
            )
        axis.set_xscale("log")
        _label_axes(
            axis, "Held-out loss against compute (band: 90 % of bootstraps)", "training FLOPs", "nats per token"
        )

    return _png(paint)


def _colors(series: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    return [COLORS[n % len(COLORS)] for n in range(len(series))]


def _label_axes(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)


def _png(paint: Callable[[Axes], None]) -> bytes:
    """Raises AtomError if matplotlib is not installed."""
    require()
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):  # not the settings of the user
        figure = Figure(figsize=(7.0, 4.2), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
