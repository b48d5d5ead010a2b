"""All plots of a release, drawn with matplotlib: of training, scores and composition, and of the laws of `atom ladder`.

Each is a PNG that is drawn from the files beside it, always with equal bytes. Equal bytes are promised for one version
of matplotlib and its fonts, which the text entry `Software` of the PNG names. With other versions a check can still
identify the training logs: the entry `Source` has their digests.
"""

from __future__ import annotations

import importlib.util
import io
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError, installing
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from release.cards import tables
from release.facts import training
from release.facts.data_facts import DataFacts
from release.facts.forecast import LOSS as VALIDATION_LOSS
from release.facts.model_facts import ModelFacts
from stages.confidence import Z95
from stages.evaluation.scores import pass_at_1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from release.prediction.ladder import Drawing

LOSS, EXPERTS = "training.png", "experts.png"
PROGRESS, INFERENCE, REINFORCEMENT = "progress.png", "inference.png", "reinforcement.png"
COMPOSITION = "composition.png"
NAMES = (LOSS, EXPERTS, PROGRESS, INFERENCE, REINFORCEMENT, COMPOSITION)
SOURCE, SOFTWARE = "Source", "Software"
"""Text entries of a plot: the digests of the logs that it shows, and the version of matplotlib that drew it."""
Drawings = dict[str, Callable[[], bytes]]
"""{name of a plot: the function that draws it}. Functions raise AtomError if matplotlib is not installed."""
DPI = 144
COLORS: tuple[str, ...] = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
COLORS += ("#56b4e9", "#882255", "#999933", "#332288", "#444444")
"""Distinct for color-blind readers (Okabe and Ito, then Tol). The background is white in every theme of a reader."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
FIGURES = ("step", "loss", "reward", "skipped", VALIDATION_LOSS)
"""Fields of the training logs that the plot of losses reads."""
MARKERS = "osv^P*Xd<>"
POINTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 1, "capsize": 2}
"""The style of points with intervals."""
LABEL_STEP = 0.055
"""The least distance of two labels, as a share of the axis."""
MOST_BARS, LABEL = 10, 34
"""Bars of a panel; the smaller ones are one bar. Characters of a label."""


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
    logs = training.logs(folder)
    if logs:
        plots[LOSS] = lambda: draw_losses(folder, source(folder))
    # A dense model has no experts, and a copied one no logs.
    if logs and model.has_experts:
        plots[EXPERTS] = lambda: draw_experts(folder, source(folder))
    plots[PROGRESS] = lambda: progress(model)
    if scores := {name: row for name, row in model.chat.get("test", {}).items() if row["problems_all"]}:
        plots[INFERENCE] = lambda: inference(scores)
    if "rlvr" in logs:
        plots[REINFORCEMENT] = lambda: reinforcement({"rlvr": training.read(logs["rlvr"])})
    return plots


def data_plots(data: DataFacts) -> Drawings:
    """Returns the plot of the dataset repository, by its name; none of data without tokens."""
    return {COMPOSITION: lambda: composition(amounts(data))} if amounts(data) else {}


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
    """Draws the losses of the phases that read text, and the mean reward of each step of the others.

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
        place, shift = (begin, 1.0), (3, -2 - 10 * (number % 3))
        _annotate(axis, tables.title(phase, tables.PHASES), place, ("data", "axes fraction"), shift, color, va="top")
        begin += last
    axis.set_xlim(0, max(begin, 1))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the names


def _annotate(
    axis: Axes,
    text: str,
    place: tuple[float, float],
    coordinates: Any,
    shift: tuple[float, float],
    color: str,
    **style: Any,
) -> None:
    """Writes a name in bold at a place of the axis, shifted by points."""
    style = {"xycoords": coordinates, "xytext": shift, "textcoords": "offset points", "color": color, **style}
    axis.annotate(text, place, fontsize=8, weight="bold", **style)


@lru_cache(maxsize=8)
def draw_experts(model: Path, source: str) -> bytes:
    """Draws the tokens of each expert at the last measurement, and balance and entropy of all steps; as `draw_losses`.

    Raises:
        AtomError: If matplotlib is not installed.
    """
    lines = {phase: training.read(log) for phase, log in training.logs(model).items()}
    measurements = [(phase, x["step"], x["experts"]) for phase, log in lines.items() for x in log if "experts" in x]
    rows = len(measurements[-1][2]["layers"]) if measurements else 0
    heights = [1.7, 1.7]
    if measurements:
        heights.insert(0, 1.2 + min(4.0, 0.25 * rows))

    def paint(figure: Figure) -> None:
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        axes = [figure.add_subplot(grid[n]) for n in range(len(heights))]
        if measurements:
            _heat_map(figure, axes[0], *measurements[-1])
        legend_lines = _curves(axes[-2], axes[-1], {phase: training.curves(log) for phase, log in lines.items()})
        if measurements:
            _draw_uniform_entropy(axes[-1], len(measurements[-1][2]["share"][0]))
        if legend_lines:
            figure.legend(handles=legend_lines, loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    return png((8.0, sum(heights) + 1.1), paint, source)


def _heat_map(figure: Figure, axis: Axes, phase: str, step: int, measurement: training.Facts) -> None:
    """Draws layers down and experts across; white is a fair share, blue less and red more."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    loads = [[share * len(row) for share in row] for row in measurement["share"]]
    # The white of the map must be a fair share, however uneven the loads are.
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, *(max(row) for row in loads)))
    image = axis.imshow(loads, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    name = tables.title(phase, tables.PHASES)
    axis.set_title(f"Tokens of each expert at step {step:,} of {name} (1 = a fair share)", loc="left", fontsize=10)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    labeled_rows = range(0, len(loads), max(1, math.ceil(len(loads) / 12)))  # at most 12 of them
    axis.set_yticks(list(labeled_rows), [str(measurement["layers"][row]) for row in labeled_rows])
    figure.colorbar(image, ax=axis, pad=0.01)


def _curves(
    above: Axes, below: Axes, curves_by_phase: dict[str, tuple[list[int], list[float], list[float]]]
) -> list[Line2D]:
    """Draws the steps of all phases, each phase after the previous one in its own color.

    Args:
        above: The axis of the balance.
        below: The axis of the entropy.
        curves_by_phase: Steps, violation and entropy of each phase.

    Returns:
        The entries of the legend.
    """
    begin, legend_lines = 0, []
    for number, (phase, (steps, violation, entropy)) in enumerate(curves_by_phase.items()):
        if not steps:
            continue
        # Steps of several phases share an axis; each phase goes on where the one before it ended.
        positions, color = range(begin, begin + len(steps)), COLORS[number % len(COLORS)]
        label = f"{tables.title(phase, tables.PHASES)}, steps {steps[0]:,} to {steps[-1]:,}"
        legend_lines += above.plot(positions, violation, color=color, linewidth=0.8, label=label)
        below.plot(positions, entropy, color=color, linewidth=0.8)
        begin += len(steps)
    above.set_title("Balance: the busiest expert's tokens over a fair share, less 1", loc="left", fontsize=10)
    above.set_ylabel("max violation")
    below.set_title("Mean entropy of the routers", loc="left", fontsize=10)
    below.set_ylabel("nats")
    below.set_xlabel("steps that moved weights, over all phases")
    for axis in (above, below):
        axis.set_ylim(bottom=0)
        axis.margins(x=0)
        axis.spines[["top", "right"]].set_visible(False)
    return legend_lines


def _draw_uniform_entropy(axis: Axes, experts: int) -> None:
    """Draws the entropy of a router without any preference."""
    axis.set_ylim(0, 1.1 * math.log(experts))
    axis.axhline(math.log(experts), color="#888888", linewidth=0.8, linestyle=":")
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-3, -3), "textcoords": "offset points"}
    text = f"ln {experts}, all experts alike"
    axis.annotate(text, (1.0, math.log(experts)), ha="right", va="top", fontsize=7, color="#444444", **place)


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
                errors = [Z95 * row["se"] for row in points.values()]
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


def inference(scores: Mapping[str, Any]) -> bytes:
    """Draws pass@k against generated tokens for each problem.

    The axis is logarithmic, errors are 95 % intervals, and the greedy answer is one point.

    Args:
        scores: scores.json of each model, by name.
    """

    def paint(figure: Figure) -> None:
        axis, ends = figure.subplots(), []
        for (name, model_scores), color, marker in zip(scores.items(), cycle(COLORS), cycle(MARKERS), strict=False):
            part = model_scores["problems_all"]
            ks = sorted(part["at"], key=int)
            points = [part["at"][k]["pass"] for k in ks]
            tokens = [part["at"][k]["tokens"] for k in ks]
            values, errors = [p["value"] for p in points], [Z95 * p["se"] for p in points]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4}
            axis.errorbar(tokens, values, errors, linewidth=1, elinewidth=0.6, **style)
            greedy = part["greedy"]
            place = greedy["tokens"], greedy["accuracy"]["value"]
            axis.plot(*place, color=color, marker="D", markersize=6, mfc="none", linestyle="none")
            ends.append((values[-1], tables.title(name), color))
        axis.set_xscale("log")
        _panel(axis, "pass@k: one of k is right, all problems", "share right")
        axis.set_xlabel("generated tokens for a problem (diamond: greedy)")
        _plain_ticks(axis)
        # Small shares would be flat lines on an axis up to 1.
        top = min(1.02, 1.3 * axis.get_ylim()[1])
        axis.set_ylim(-0.02 * top, top)
        _label_ends(axis, ends)

    return png((5.6, 3.8), paint)


def reinforcement(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draws validation accuracy by kind against the tokens generated for training.

    Args:
        logs: The lines of training.jsonl of each run, by name; those with `validation` and `generated` are drawn.
    """

    def paint(figure: Figure) -> None:
        axis, curves, ends = figure.add_subplot(), [], []
        for name, lines in logs.items():
            curves += [(name, kind) for kind in sorted({kind for row in lines for kind in row.get("validation", {})})]
        for (name, kind), color, marker in zip(curves, cycle(COLORS), cycle(MARKERS), strict=False):
            measured = [x for x in logs[name] if kind in x.get("validation", {}) and "generated" in x]
            tokens = [x["generated"] for x in measured]
            values = [x["validation"][kind] for x in measured]
            axis.plot(tokens, values, color=color, marker=marker, markersize=4, linewidth=1)
            run = f"{name}, " if len(logs) > 1 else ""
            if tokens:
                ends.append((values[-1], f"{run}{kind}", color))
        axis.set_ylim(-0.02, 1.02)
        _panel(axis, "Validation problems during reinforcement learning, greedy", "mean reward")
        axis.set_xlabel("tokens generated in training (the log has no errors of these means)")
        _label_ends(axis, ends)

    return png((7.0, 3.8), paint)


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
    """Writes the name of each curve next to its end, no two of them over each other.

    `ends` has the value, the name and the color of each curve.
    """
    bottom, top = axis.get_ylim()
    step = LABEL_STEP * (top - bottom)
    low, places = bottom - step, []
    # From below, each label moves up until it does not touch the one before.
    for y, name, color in sorted(ends, key=lambda end: end[0]):
        low = max(low + step, y)
        places.append((low, name, color))
    # All move down if the highest one is above the axis.
    shift = max(0.0, places[-1][0] - top) if places else 0.0
    for y, name, color in places:
        place, coordinates = (1.0, y - shift), ("axes fraction", "data")
        _annotate(axis, name, place, coordinates, (4, 0), color, va="center", annotation_clip=False)


def amounts(data: DataFacts) -> dict[str, dict[str, int]]:
    """Returns {panel: {label: tokens}}, the largest first, with at most MOST_BARS of each."""
    by_source = {name: sum(row.tokens.values()) for name, row in data.sources.items()}
    by_license = {name: row.tokens for name, row in data.documents.licenses.items()}
    return {
        f"Kept tokens by {kind}": _largest(tokens)
        for kind, tokens in (("source", by_source), ("license", by_license))
        if sum(tokens.values())
    }


def _largest(tokens: Mapping[str, int]) -> dict[str, int]:
    rows = sorted(tokens.items(), key=lambda row: (-row[1], row[0]))
    shown, others = rows[:MOST_BARS], rows[MOST_BARS:]
    # Smaller ones are one bar, so that a plot of a thousand sources stays readable.
    rest = {f"{len(others)} others": sum(value for _, value in others)} if others else {}
    return dict(shown) | rest


def composition(panels: Mapping[str, Mapping[str, int]]) -> bytes:
    """Draws a bar for each row of the panels that `amounts` gives."""

    def paint(figure: Figure) -> None:
        # All bars have the same height, whatever the number in a panel.
        ratios = [len(rows) for rows in panels.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
        for axis, color, (title, rows) in zip(axes, COLORS, panels.items(), strict=False):
            _bars(axis, title, rows, color)

    return png((8.0, 0.9 * len(panels) + 0.27 * sum(map(len, panels.values()))), paint)


def _bars(axis: Axes, title: str, rows: Mapping[str, int], color: str) -> None:
    total = sum(rows.values())
    names = [name if len(name) <= LABEL else f"{name[: LABEL - 1]}…" for name in map(escaped, rows)]
    axis.barh(range(len(rows)), list(rows.values()), color=color, height=0.7)
    # matplotlib would read what two dollar signs enclose as a formula
    axis.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in names], fontsize=8)
    # matplotlib counts from below, and the largest bar stands first.
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xticks([])
    # Room for the number at the end of the longest bar.
    axis.set_xlim(0, 1.25 * max(rows.values()))
    for place, value in enumerate(rows.values()):
        style: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(f"{value:,} ({value / total:.1%})", (value, place), fontsize=8, **style)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def law(drawing: Drawing) -> bytes:
    """Draws a law of `atom ladder` by compute, with its band, the runs, and the predictions."""
    import numpy as np

    def paint(figure: Figure) -> None:
        axis = figure.add_subplot()
        compute, values, lows, highs = np.asarray(drawing.law).T
        axis.plot(compute, values, color=COLORS[-1], linewidth=1.2, label=drawing.label)
        axis.fill_between(compute, lows, highs, color=COLORS[-1], alpha=0.15, linewidth=0)
        for number, (label, points) in enumerate({**drawing.runs, **drawing.predicted}.items()):
            x, y, low, high = np.asarray(points).T
            marker, color = MARKERS[number % len(MARKERS)], COLORS[number % len(COLORS)]
            axis.errorbar(x, y, [y - low, high - y], fmt=marker, color=color, markersize=4, label=label)
        axis.set_xscale("log")
        _panel(axis, drawing.title, "")
        axis.set_xlabel(drawing.unit)
        axis.legend(fontsize=8, frameon=False)

    return png((7.0, 4.2), paint)
