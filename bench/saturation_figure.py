"""The figure of bench/rlhf_saturation.py, drawn from its points: equal bytes for one version of matplotlib.

python bench/saturation_figure.py runs/rlhf-saturation.json docs/rlhf-saturation.png
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intervals import interval

from release.cards.plots import COLORS, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[Mapping[str, Any]]
TITLES = {"rlvr": "RLVR: problems, verified", "rlhf": "RLHF: notes, reward model", "rules": "notes, the rules"}
PARTS = ("act", "person", "thing", "ending")


def draw(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """A picture of three panels. curves: of each seed, the points of each policy."""

    def paint(success: Axes, preference: Axes, parts: Axes) -> None:
        for color, (arm, title) in zip(COLORS, TITLES.items(), strict=False):
            _band(success, curves, arm, lambda point: point["task"], color, title)
        _label(success, "The task's own success, held out", "share of right results, or of notes that do it")
        for color, arm in ((COLORS[1], "rlhf"), (COLORS[2], "rules")):
            _band(preference, curves, arm, lambda point: point["win_rate"], color, f"{TITLES[arm]}: win rate")
        _band(preference, curves, "rlhf", lambda point: point["reward"], COLORS[4], "RLHF: reward model's own score")
        _label(preference, "Preference, against the weights before", "share of wins, ties as half; or reward")
        for color, part in zip((COLORS[0], COLORS[2], COLORS[3], COLORS[4]), PARTS, strict=True):
            _seeds(parts, curves, lambda point, part=part: point["parts"][part], color, part)  # type: ignore[misc]
        _seeds(parts, curves, lambda point: point["task"], COLORS[1], "task: act, person and thing")
        _label(parts, "Parts of the preference reward, RLHF, by seed", "share of notes")

    return png((13.0, 4.5), lambda figure: paint(*figure.subplots(1, 3)))


def _band(
    axis: Axes, curves: Sequence[Mapping[str, Any]], arm: str, value: Callable[[Mapping[str, Any]], float], color: str,
    label: str,
) -> None:  # fmt: skip
    """The mean over seeds at each measurement against their mean compute, and its 95 % interval."""
    columns: list[Points] = list(zip(*(curve[arm] for curve in curves), strict=True))
    flops = [statistics.fmean(point["flops"] for point in column) / 1e9 for column in columns]
    means, lows, highs = zip(*(interval([value(point) for point in column]) for column in columns), strict=True)
    axis.plot(flops, means, color=color, linewidth=1.2, label=label)
    axis.fill_between(flops, lows, highs, color=color, alpha=0.15, linewidth=0)


def _seeds(
    axis: Axes, curves: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], color: str, label: str
) -> None:
    """RLHF's curve of each seed, whose parts may go different ways."""
    for number, curve in enumerate(curves):
        flops = [point["flops"] / 1e9 for point in curve["rlhf"]]
        values = [value(point) for point in curve["rlhf"]]
        axis.plot(flops, values, color=color, linewidth=0.9, label=None if number else label)


def _label(axis: Axes, title: str, name: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel("compute after fine-tuning, GFLOPs")
    axis.set_ylabel(name)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    points, figure_path = map(Path, sys.argv[1:])
    figure_path.write_bytes(draw(json.loads(points.read_text())))
