"""The two plots of a precision simulation: losses by step, and underflow by layer. Equal figures give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from stages.mcore.quantize import KINDS
from stages.train.precision_simulation.report import Runs

COLORS = {
    "fp8-tensorwise": "#d1603d",
    "fp8-blockwise": "#2a7f9e",
    "mxfp8": "#5b8c3a",
    "nvfp4": "#8a4fa0",
    "mxfp4": "#a08a2a",
}
SMOOTH = 5
"""Steps over which a point of the deviation is averaged."""
FLOOR = 1e-6
"""Rates below it have the palest color."""


def losses(report: Mapping[str, Any], runs: Runs, path: Path) -> None:
    """Draws the losses above and their deviation from the baseline below; mean over seeds, and the range from minimum
    to maximum."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    seeds, baseline = range(report["seeds"]), report["baseline"]["precision"]
    curves = {name: _curves([runs[name, s] for s in seeds]) for name in _names(report)}
    base = curves[baseline]
    _band(above, base, "black", baseline)
    for name, curve in curves.items():
        if name == baseline:
            continue
        _band(above, curve, COLORS[name], name)
        steps = min(curve.shape[1], base.shape[1])
        _band(below, _smooth(100 * (curve[:, :steps] / base[:, :steps] - 1)), COLORS[name], name, SMOOTH - 1)
    last_step = report["training"]["steps"]
    for axes in (above, below):
        axes.axvspan(last_step - report["window_steps"] + 0.5, last_step + 0.5, color="0.93", zorder=0)
        axes.grid(alpha=0.3)
    above.set_ylabel("loss (nats per byte)")
    above.set_title(f"Precision simulation of {report['recipe']}, {report['seeds']} seeds; grey: the steps that count")
    above.legend()
    bound = 100 * report["bound"]
    for side in (-bound, bound):
        below.axhline(side, color="black", linestyle=":", linewidth=1)
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel(f"deviation from {baseline} (%)")
    below.set_xlabel(f"step; deviations are means over the last {SMOOTH} steps, the dotted lines are the bound")
    half_range = max(3 * bound, 1.2 * max((abs(d) * 100 for d in _deviations(report)), default=0.0))
    below.set_ylim(-half_range, half_range)
    _save(figure, path)


def rates(report: Mapping[str, Any], path: Path) -> None:
    """Underflow of every linear layer, by precision and tensor kind, in per cent."""
    entries = report["precisions"]
    rows = list(dict.fromkeys((x["layer"], x["linear"]) for entry in entries for x in entry["linears"]))
    rows.sort(key=lambda row: row[0])  # stable: by layer, then in the model's order
    figure = Figure(figsize=(3.2 + 2.6 * len(entries), 1.6 + 0.32 * len(rows)), dpi=120, layout="constrained")
    for number, (axes, entry) in enumerate(zip(np.ravel(figure.subplots(1, len(entries))), entries, strict=True)):
        rounded = {
            (x["layer"], x["linear"]): [x["rates"][kind]["underflow"] for kind in KINDS] for x in entry["linears"]
        }
        values = np.array([rounded.get(row, [np.nan] * len(KINDS)) for row in rows])  # nan: the layer is in bf16
        axes.imshow(np.maximum(values, FLOOR), norm=LogNorm(FLOOR, 1.0), cmap="YlOrRd", aspect="auto")
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_yticks(
            range(len(rows)), [f"{x} {y}" for x, y in rows] if number == 0 else [""] * len(rows), fontsize=8
        )
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            color = "white" if value > 0.05 else "black"
            axes.text(column, row, f"{100 * value:.2g}" if value else "0", ha="center", va="center", fontsize=7,
                      color=color)  # fmt: skip
        axes.set_title(entry["precision"], fontsize=10)
    figure.suptitle(f"Precision simulation of {report['recipe']}: underflow, % of the nonzero values", fontsize=10)
    _save(figure, path)


def _names(report: Mapping[str, Any]) -> list[str]:
    return [report["baseline"]["precision"], *(x["precision"] for x in report["precisions"])]


def _deviations(report: Mapping[str, Any]) -> list[float]:
    return [d for x in report["precisions"] for d in x["deviation"]["by_seed"] if d is not None]


def _curves(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[seeds, steps], up to the last step that all of them have."""
    steps = min(len(run["losses"]) for run in runs)
    return np.array([run["losses"][:steps] for run in runs])


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Running means along steps; unchanged if there are too few."""
    if curves.shape[1] < SMOOTH:
        return curves
    return np.array([np.convolve(curve, np.full(SMOOTH, 1 / SMOOTH), mode="valid") for curve in curves])


def _band(axes: Any, curves: np.ndarray, color: str, label: str, shift: int = 0) -> None:
    steps = np.arange(1, curves.shape[1] + 1) + shift
    axes.plot(steps, curves.mean(0), color=color, label=label, linewidth=1.2)
    axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})  # without the version of matplotlib
