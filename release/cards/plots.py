"""All plots of a release, drawn with matplotlib: of training and scores; and those of `atom ladder` and `atom mix`.

Each is a PNG that is drawn from the files beside it, always with equal bytes. Equal bytes are promised for one version
of matplotlib and its fonts, which the text entry `Software` of the PNG names. With other versions a check can still
identify the training logs: the entry `Source` has their digests.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError, installing
from pipeline.core.store import sha256_file
from release.cards import tables
from release.facts import training
from release.facts.forecast import LOSS as VALIDATION_LOSS
from release.facts.model_facts import ModelFacts
from stages.confidence import half_width
from stages.evaluation.scores import pass_at_1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from release.prediction.ladder import Points

LOSS, PROGRESS = "training.png", "progress.png"
NAMES = (LOSS, PROGRESS)
SOURCE, SOFTWARE = "Source", "Software"
"""Text entries of a plot: the digests of the logs that it shows, and the version of matplotlib that drew it."""
Drawings = dict[str, Callable[[], bytes]]
"""{name of a plot: the function that draws it}. Functions raise AtomError if matplotlib is not installed."""
DPI = 144
COLORS: tuple[str, ...] = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
COLORS += ("#56b4e9", "#882255", "#999933", "#332288", "#444444")
"""Distinct for color-blind readers (Okabe and Ito, then Tol). The background is white in every theme of a reader."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
BALANCE = "expert_max_violation"
FIGURES = ("step", "loss", "reward", "skipped", VALIDATION_LOSS, BALANCE)
"""Fields of the training logs that the plot of losses reads."""
MARKERS = "osv^P*Xd<>"
POINTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 1, "capsize": 2}
"""The style of points with intervals."""


def require() -> None:
    """Raises AtomError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise AtomError(
            f"atom build draws {LOSS} of each model with matplotlib, which is not installed; {installing('report')}"
        )


def source(model: Path) -> str:
    """Returns the logs of a model's plot, one per line: `<sha256> training/<phase>.jsonl`."""
    return "\n".join(f"{sha256_file(log)}  training/{log.name}" for log in training.logs(model).values())


def entries(png: bytes) -> dict[str, str] | None:
    """Returns the text entries of a plot by name; None if it is no whole PNG (PNG specification, section 5)."""
    if not png.startswith(SIGNATURE):
        return None
    offset, kind, texts = len(SIGNATURE), b"", dict[str, str]()
    while kind != b"IEND":
        if offset + 12 > len(png):
            return None
        length, kind = struct.unpack(">I4s", png[offset : offset + 8])
        end = offset + 8 + length
        # The checksum of a chunk covers its kind and its data, and not its length.
        if png[end : end + 4] != struct.pack(">I", zlib.crc32(png[offset + 4 : end])):
            return None
        # A chunk: length, kind, data, and the checksum of kind and data.
        name, _, text = png[offset + 8 : end].partition(b"\0")
        if kind == b"tEXt":
            texts[name.decode("latin-1")] = text.decode("latin-1")
        offset = end + 4
    # Bytes after the last chunk would be no part of the picture.
    return texts if offset == len(png) else None


def model_plots(folder: Path, model: ModelFacts) -> Drawings:
    """Returns the plots of a model repository, by name.

    Args:
        folder: The repository, with its training logs.
        model: Its facts, with the scores to draw.
    """
    plots: Drawings = {}
    # A copied model has no logs.
    if training.logs(folder):
        plots[LOSS] = lambda: draw_losses(folder, source(folder))
    plots[PROGRESS] = lambda: progress(model)
    return plots


def version() -> str:
    """Returns the text entry `Software` of the plots that are drawn here."""
    import matplotlib

    return f"Matplotlib version{matplotlib.__version__}, https://matplotlib.org/"


def png(figure_size: tuple[float, float], paint: Callable[[Figure], None], source: str = "") -> bytes:
    """Returns a figure as PNG.

    Args:
        figure_size: Width and height in inches.
        paint: Draws into the figure.
        source: The text entry `Source`.

    Raises:
        AtomError: If matplotlib is not installed.
    """
    require()
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not the settings of the user. A line of very many steps is rasterized in pieces, or Agg refuses it.
    with matplotlib.style.context(["default", {"agg.path.chunksize": 10000}]):
        figure = Figure(figsize=figure_size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        buffer = io.BytesIO()
        stated = {SOFTWARE: version(), **({SOURCE: source} if source else {})}
        figure.savefig(buffer, format="png", metadata=stated)
    return buffer.getvalue()


@lru_cache(maxsize=8)  # the gates request the plot that the build has just drawn
def draw_losses(model: Path, source: str) -> bytes:
    """Draws the losses of the phases that read text, the mean reward of each step of the others, and the balance.

    The balance is that of the experts; a dense model has none.

    Args:
        model: A model repository with its training logs.
        source: Their digests.

    Raises:
        AtomError: If matplotlib is not installed.
    """
    # Logs have many fields; only those of the plot are held in memory.
    lines = {phase: training.read(log, FIGURES) for phase, log in training.logs(model).items()}
    rewarded = {phase: rows for phase, rows in lines.items() if any("reward" in row for row in rows)}
    read_text = {phase: rows for phase, rows in lines.items() if phase not in rewarded}
    panels = []
    if read_text:
        panels.append((read_text, "loss", "nats per token", "Loss (line: each step; dots: validation)"))
    if rewarded:
        panels.append((rewarded, "reward", "mean reward of a step", "Reward of the answers"))
    if any(BALANCE in row for rows in lines.values() for row in rows):
        heading = "Balance: the busiest expert's tokens over a fair share, less 1"
        panels.append((lines, BALANCE, "max violation", heading))

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (phases, key, unit, heading) in zip(axes, panels, strict=True):
            _phases(axis, phases, key)
            _panel(axis, heading, unit)
            axis.set_xlabel("steps, phase after phase")

    return png((8.0, 2.9 * len(panels)), paint, source)


def _phases(axis: Axes, phases: dict[str, list[training.Facts]], key: str) -> None:
    """Draws a figure of all steps, each phase after the previous one in its own color, with its name above."""
    begin = 0
    for number, (phase, rows) in enumerate(phases.items()):
        color, last = COLORS[number % len(COLORS)], max(row["step"] for row in rows)
        # Skipped steps moved no weight.
        steps = [row for row in rows if key in row and "skipped" not in row]
        axis.plot([begin + row["step"] for row in steps], [row[key] for row in steps], color=color, linewidth=0.9)
        held = [row for row in rows if VALIDATION_LOSS in row] if key == "loss" else []
        positions, losses = [begin + row["step"] for row in held], [row[VALIDATION_LOSS] for row in held]
        axis.plot(positions, losses, "o", color=color, markersize=4, mec="white", mew=0.5)
        if number:
            axis.axvline(begin, color="#bbbbbb", linewidth=0.6)
        # Names take three rows in turn, so that those of short phases do not overlap.
        style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        style |= {"xytext": (3, -2 - 10 * (number % 3)), "color": color, "weight": "bold"}
        axis.annotate(tables.title(phase, tables.PHASES), (begin, 1.0), fontsize=8, **style)
        begin += last
    axis.set_xlim(0, max(begin, 1))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the names


def progress(model: ModelFacts) -> bytes:
    """Draws bits per byte of held-out text and the share of right answers after each phase, with 95 % intervals."""
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
                # Not every model was measured in every series, so points keep the place of their model.
                places = [names.index(model_name) for model_name in points]
                values = [row["value"] for row in points.values()]
                errors = [half_width(row) for row in points.values()]
                axis.errorbar(places, values, errors, color=color, **POINTS)
                labels.append((name, color))
            _panel(axis, heading, unit)
            axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the names
            axis.set_xticks(range(len(names)), list(tables.titles(names).values()), rotation=30, ha="right")
            axis.set_xlim(-0.3, len(names) - 0.7)
            if len(labels) > 1:
                for number, (name, color) in enumerate(labels):
                    place: dict[str, Any] = {"xycoords": "axes fraction", "va": "top"}
                    axis.annotate(name, (0.02, 0.98 - 0.08 * number), fontsize=8, color=color, weight="bold", **place)

    return png((8.4, 3.4), paint)


def _panel(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)


def law(curve: Points, points: Mapping[str, Points]) -> bytes:
    """Draws a law of `atom ladder` by compute, with its band, and the runs and predictions by label."""
    import numpy as np

    def paint(figure: Figure) -> None:
        axis = figure.add_subplot()
        compute, values, lows, highs = np.asarray(curve).T
        axis.plot(compute, values, color=COLORS[-1], linewidth=1.2, label="least loss for the compute")
        axis.fill_between(compute, lows, highs, color=COLORS[-1], alpha=0.15, linewidth=0)
        for number, (label, rows) in enumerate(points.items()):
            x, y, low, high = np.asarray(rows).T
            marker, color = MARKERS[number % len(MARKERS)], COLORS[number % len(COLORS)]
            axis.errorbar(x, y, [y - low, high - y], fmt=marker, color=color, markersize=4, label=label)
        axis.set_xscale("log")
        _panel(axis, "loss by training FLOPs, 6 N D, with 90% bands", "")
        axis.set_xlabel("training FLOPs, 6 N D")
        axis.legend(fontsize=8, frameon=False)

    return png((7.0, 4.2), paint)


def pareto(report: Mapping[str, Any]) -> bytes:
    """Draws the mean bits per byte of the mixes of `atom mix` by those of each domain, in a panel for each.

    Args:
        report: The content of mix.json.
    """
    domains = report["domains"]

    def paint(figure: Figure) -> None:
        for axis, domain in zip(figure.subplots(len(domains), 1, squeeze=False)[:, 0], domains, strict=True):
            series = {"proxies, measured": report["runs"], "best mixes": report["pareto"][domain]}
            series |= {f"{name} mix": [mix] for name, mix in report["mixes"].items()}
            for number, (label, mixes) in enumerate(series.items()):
                style = {"marker": MARKERS[number], "linestyle": "-" if label == "best mixes" else "", "markersize": 4}
                x, y = [mix["bits"][domain] for mix in mixes], [mix["mean"] for mix in mixes]
                axis.plot(x, y, color=COLORS[number], label=label, **style)
            _panel(axis, f"Mean bits per byte by those of {domain}", "mean bits per byte")
        axis.legend(fontsize=8, frameon=False)

    return png((7.0, 2.9 * len(domains)), paint)
