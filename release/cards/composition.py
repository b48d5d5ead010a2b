"""`composition.png` of the dataset repository: the kept tokens by source and by license of the document. And the first
document of each source, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.core.text import escaped
from release.assembly.data_facts import DataFacts
from release.cards.plot import COLORS, Drawings, png
from release.cards.tables import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "composition.png"
MOST_BARS, LABEL = 10, 34
"""Bars of a panel; the smaller ones are one bar. Characters of a label."""
CHARACTERS = 240
"""Of a document, in the card."""


def amounts(data: DataFacts) -> dict[str, dict[str, int]]:
    """{panel: {label: tokens}}, the largest first, with at most MOST_BARS of each."""
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
    rest = {f"{len(others)} others": sum(value for _, value in others)} if others else {}
    return dict(shown) | rest


def plots(data: DataFacts) -> Drawings:
    """The picture of the data card, by its name; none of data without tokens."""
    panels = amounts(data)
    if not panels:
        return {}

    def paint(figure: Figure) -> None:
        ratios = [len(rows) for rows in panels.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
        for axis, color, (title, rows) in zip(axes, COLORS, panels.items(), strict=False):
            _bars(axis, title, rows, color)

    size = 8.0, 0.9 * len(panels) + 0.27 * sum(map(len, panels.values()))
    return {NAME: lambda: png(size, paint)}


def _bars(axis: Axes, title: str, rows: Mapping[str, int], color: str) -> None:
    total = sum(rows.values())
    names = [name if len(name) <= LABEL else f"{name[: LABEL - 1]}…" for name in map(escaped, rows)]
    axis.barh(range(len(rows)), list(rows.values()), color=color, height=0.7)
    axis.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xticks([])
    axis.set_xlim(0, 1.25 * max(rows.values()))
    for place, value in enumerate(rows.values()):
        axis.annotate(
            f"{value:,} ({value / total:.1%})", (value, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def examples(data: DataFacts) -> list[str]:
    """The beginning of the first document of each source that has one with a text."""
    items = [
        f"- `{_code(id)}` of {source}: `{_code(text)[:CHARACTERS]}`"
        for source, (id, text) in data.first_documents.items()
    ]
    rule = (
        "The first training document of each source, in the order of its table and cut off at "
        f"{count(CHARACTERS)} characters, with line breaks as spaces. Nobody chose them:"
    )
    return [rule, "", *items] if items else []


def is_example_of(line: str, id: str) -> bool:
    """Whether a line of a data card shows the document with this id."""
    return line.startswith(f"- `{_code(id)}` of ")


def _code(text: str) -> str:
    """A text as code in one line."""
    return escaped(" ".join(text.split()).replace("`", "'"))
