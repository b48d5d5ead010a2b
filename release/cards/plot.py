"""`training.png` and `experts.png` of a model repository: drawn from the training logs beside them, always with equal
bytes.

Equal bytes are promised for one version of matplotlib and its fonts, which the text entry `Software` of the PNG names.
With other versions a check can still identify the data: the entry `Source` has the digests of the logs.
"""

from __future__ import annotations

import importlib.util
import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import AtomError, installing
from pipeline.core.store import sha256_file
from release.assembly import training
from release.cards import tables
from release.prediction.forecast import LOSS as VALIDATION_LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

NAMES = LOSS, EXPERTS = "training.png", "experts.png"
SOURCE, SOFTWARE = "Source", "Software"
"""Text entries of a plot: the digests of the logs that it shows, and the version of matplotlib that drew it."""
Drawings = dict[str, Callable[[], bytes]]
"""{name of a plot: the function that draws it}. Functions raise AtomError if matplotlib is not installed."""
DPI = 144
COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#332288", "#444444",
)  # fmt: skip
"""Distinct for color-blind readers (Okabe and Ito, then Tol). The background is white in every theme of a reader."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def require() -> None:
    """Raises AtomError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise AtomError(
            f"atom build draws {LOSS} of each model with matplotlib, which is not installed; {installing('report')}"
        )


def source(model: Path) -> str:
    """The logs of a model's plot, one per line: `<sha256> training/<phase>.jsonl`."""
    return "\n".join(f"{sha256_file(log)}  training/{log.name}" for log in training.logs(model).values())


def entries(png: bytes) -> dict[str, str] | None:
    """The text entries of a plot by name; None if it is no PNG whose chunks are all there, each with its checksum (PNG
    specification, section 5)."""
    if not png.startswith(SIGNATURE):
        return None
    offset, kind, texts = len(SIGNATURE), b"", dict[str, str]()
    while kind != b"IEND":
        if offset + 12 > len(png):
            return None
        length, kind = struct.unpack(">I4s", png[offset : offset + 8])
        end = offset + 8 + length
        if png[end : end + 4] != struct.pack(">I", zlib.crc32(png[offset + 4 : end])):
            return None
        name, _, text = png[offset + 8 : end].partition(b"\0")
        if kind == b"tEXt":
            texts[name.decode("latin-1")] = text.decode("latin-1")
        offset = end + 4
    return texts if offset == len(png) else None


def training_plots(model: Path, has_experts: bool) -> Drawings:
    """The plots of a model repository that its training logs give; none without logs."""
    if not training.logs(model):
        return {}
    return {LOSS: partial(draw_losses, model), **({EXPERTS: partial(draw_experts, model)} if has_experts else {})}


def version() -> str:
    """The text entry `Software` of the plots that are drawn here."""
    import matplotlib

    return f"Matplotlib version{matplotlib.__version__}, https://matplotlib.org/"


def png(figure_size: tuple[float, float], paint: Callable[[Figure], None], source: str = "") -> bytes:
    """A figure as PNG. figure_size: in inches. Raises AtomError if matplotlib is not installed."""
    require()
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not the settings of the user; a line of very many steps is rasterized in pieces, or Agg refuses it
    with matplotlib.style.context(["default", {"agg.path.chunksize": 10000}]):
        figure = Figure(figsize=figure_size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        buffer = io.BytesIO()
        stated = {SOFTWARE: version(), **({SOURCE: source} if source else {})}
        figure.savefig(buffer, format="png", metadata=stated)
    return buffer.getvalue()


def draw_losses(model: Path) -> bytes:
    """The plot: loss of every step and validation loss of the phases that read text, and the mean reward of each step
    of the others. Raises AtomError if matplotlib is not installed.

    model: a model repository with its training logs.
    """
    return _draw_losses(_Logs(source(model), model))


def draw_experts(model: Path) -> bytes:
    """The plot: tokens of each expert at the last measurement, and balance and entropy of all steps.

    model: a model repository with its training logs. Raises AtomError if matplotlib is not installed.
    """
    return _draw_experts(_Logs(source(model), model))


@dataclass(frozen=True)
class _Logs:
    """Training logs that are equal if their bytes are."""

    source: str
    model: Path = field(compare=False)


FIGURES = ("step", "loss", "reward", "skipped", VALIDATION_LOSS)


@lru_cache(maxsize=8)
def _draw_losses(logs: _Logs) -> bytes:
    """Cached, as the plot of experts."""
    lines = {phase: training.read(log, FIGURES) for phase, log in training.logs(logs.model).items()}
    rewarded = {phase: rows for phase, rows in lines.items() if any("reward" in row for row in rows)}
    read_text = {phase: rows for phase, rows in lines.items() if phase not in rewarded}
    panels = [(read_text, "loss", "nats per token")] * bool(read_text)
    panels += [(rewarded, "reward", "mean reward of a step")] * bool(rewarded)

    def paint(figure: Figure) -> None:
        for axis, (phases, key, unit) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _phases(axis, phases, key)
            axis.set_ylabel(unit)
            axis.set_xlabel("steps, phase after phase")
            note = " (line: each step; dots: validation)" if key == "loss" else ""
            axis.set_title(
                f"{key.capitalize()} of the answers" if key == "reward" else f"Loss{note}", loc="left", fontsize=10
            )

    return png((8.0, 2.9 * len(panels)), paint, logs.source)


def _phases(axis: Axes, phases: dict[str, list[training.Facts]], key: str) -> None:
    """Draws a figure of all steps, each phase after the previous one in its own color, with its name above."""
    begin = 0
    for number, (phase, rows) in enumerate(phases.items()):
        color, last = COLORS[number % len(COLORS)], max(row["step"] for row in rows)
        steps = [row for row in rows if key in row and "skipped" not in row]
        axis.plot([begin + row["step"] for row in steps], [row[key] for row in steps], color=color, linewidth=0.9)
        held = [row for row in rows if VALIDATION_LOSS in row] if key == "loss" else []
        positions = [begin + row["step"] for row in held]
        axis.plot(
            positions, [row[VALIDATION_LOSS] for row in held], "o", color=color, markersize=4, mec="white", mew=0.5
        )
        if number:
            axis.axvline(begin, color="#bbbbbb", linewidth=0.6)
        label = tables.title(phase, tables.PHASES)
        axis.annotate(
            label, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -2 - 10 * (number % 3)),
            textcoords="offset points", va="top", fontsize=8, color=color, weight="bold",
        )  # fmt: skip
        begin += last
    axis.set_xlim(0, max(begin, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the names


@lru_cache(maxsize=8)
def _draw_experts(logs: _Logs) -> bytes:
    """Cached, because the gates request the plot that the build has just drawn."""
    lines = {phase: training.read(log) for phase, log in training.logs(logs.model).items()}
    measurements = [(phase, x["step"], x["experts"]) for phase, log in lines.items() for x in log if "experts" in x]
    rows = len(measurements[-1][2]["layers"]) if measurements else 0
    heights = [1.2 + min(4.0, 0.25 * rows)] * bool(measurements) + [1.7, 1.7]

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

    return png((8.0, sum(heights) + 1.1), paint, logs.source)


def _heat_map(figure: Figure, axis: Axes, phase: str, step: int, measurement: training.Facts) -> None:
    """Draws layers down and experts across; white is a fair share, blue less and red more."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    loads = [[share * len(row) for share in row] for row in measurement["share"]]
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, *(max(row) for row in loads)))
    image = axis.imshow(loads, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    name = tables.title(phase, tables.PHASES)
    axis.set_title(f"Tokens of each expert at step {step:,} of {name} (1 = a fair share)", loc="left", fontsize=10)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    labeled_rows = range(0, len(loads), max(1, -(-len(loads) // 12)))
    axis.set_yticks(list(labeled_rows), [str(measurement["layers"][row]) for row in labeled_rows])
    figure.colorbar(image, ax=axis, pad=0.01)


def _curves(
    above: Axes, below: Axes, curves_by_phase: dict[str, tuple[list[int], list[float], list[float]]]
) -> list[Line2D]:
    """Draws the steps of all phases in one line, each phase after the previous one in its own color. Returns the
    entries of the legend."""
    begin, legend_lines = 0, []
    for number, (phase, (steps, violation, entropy)) in enumerate(curves_by_phase.items()):
        if not steps:
            continue
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
    axis.annotate(
        f"ln {experts}, all experts alike", (1.0, math.log(experts)), xycoords=("axes fraction", "data"),
        xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=7, color="#444444",
    )  # fmt: skip
