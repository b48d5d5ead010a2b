"""A drawing of three panels as an SVG: equal bytes for one version of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from release.cards.plot import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(paint: Callable[[Axes, Axes, Axes], None]) -> bytes:
    """The SVG after `paint` has drawn into its three axes. Raises AtomError without matplotlib."""
    require()
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = ["default", {"svg.hashsalt": "atom", "font.size": 8}]  # not those of the user
    with matplotlib.style.context(settings):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        paint(*figure.subplots(1, 3))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue() + f"<!-- matplotlib {version('matplotlib')} -->\n".encode()
