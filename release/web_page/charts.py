"""Line charts, with axes, ticks and a legend, as inline SVG or SVG files, and bars as inline SVG. Colors are those of
the style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.core.text import escaped

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
TITLE = 22
"""Height of the title of a file."""
COLORS = 8
BAR, NAMES, VALUES, NAME_CHARACTERS = 20, 150, 104, 24
"""Of bars: the height of a row, the widths of names and of values, and the characters of a name."""
MOST_SERIES = 2 * COLORS
"""Lines of one chart; further ones are counted in the legend. Those after COLORS are dashed."""

INKS = ("#1f6fb2", "#b6420c", "#1d7a46", "#7b3fa0", "#8a6a00", "#a8255f", "#0b7a80", "#5b5f66")
"""The colors of a file, which has no style sheet: those of page.css on white."""
FILE_STYLE = (
    "text{font-family:sans-serif;fill:#1c1f23}.title{font-size:11px;font-weight:bold}.tick{font-size:9.5px}"
    ".axis{font-size:10px}.sheet{fill:#fff}.grid{stroke:#e3e5e0}.line{fill:none;stroke-width:1.8}"
    ".band{opacity:.17;stroke:none}.dashed{stroke-dasharray:5 3}"
    + "".join(f".line.c{n}{{stroke:{ink}}}.band.c{n},.dot.c{n}{{fill:{ink}}}" for n, ink in enumerate(INKS))
)


@dataclass(frozen=True)
class Series:
    """points: (x, y, the smallest y, the largest y), by x; a band is drawn where the last two differ. dots: they are
    measurements that no line joins, and have a whisker instead of a band."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    dots: bool = False


def chart(title: str, series: Sequence[Series], x_label: str, unit: str = "", logarithmic: bool = False) -> Markup:
    """A figure with a caption. logarithmic: the x axis. Series without points are left out; without any, nothing is
    drawn."""
    drawn = [each for each in series if each.points]
    shown = drawn[:MOST_SERIES]
    if not shown:
        return Markup()
    legend = _legend(shown, len(drawn) - len(shown)) if len(shown) > 1 else Markup()
    note = Markup(" <small>{}</small>").format(unit) if unit else Markup()
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>{}</figure>'
    ).format(
        escaped(title, 80), note, WIDTH, HEIGHT, _label(title, shown, x_label), _drawing(shown, x_label, logarithmic),
        legend,
    )  # fmt: skip


def standalone(title: str, series: Sequence[Series], x_label: str) -> str:
    """An SVG file of a chart with a logarithmic x axis, with its title above and the legend below. Further series than
    MOST_SERIES are left out. Raises ValueError without any point."""
    shown = [each for each in series if each.points][:MOST_SERIES]
    if not shown:
        raise ValueError("a chart needs a point")
    rows = Markup("").join(
        Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"/><text class="tick" x="{}" y="{}">{}</text>').format(
            n % COLORS, LEFT + 6, y := HEIGHT + 12 + 13 * n, LEFT + 15, y + 3.5,
            f"{escaped(each.label, 60)}: {short(each.points[-1][1])}",
        )
        for n, each in enumerate(shown)
    )  # fmt: skip
    height = HEIGHT + TITLE + 13 * len(shown) + 12
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">'
            '<style>{}</style><rect class="sheet" width="100%" height="100%"/>'
            '<text class="title" x="{}" y="14">{}</text><g transform="translate(0 {})">{}{}</g></svg>\n'
        ).format(
            WIDTH, height, 2 * WIDTH, _label(title, shown, x_label), Markup(FILE_STYLE), LEFT, escaped(title, 80),
            TITLE, _drawing(shown, x_label, True), rows,
        )
    )  # fmt: skip


def _label(title: str, shown: Sequence[Series], x_label: str) -> str:
    words = "; ".join(_spoken(each) for each in shown)
    return escaped(f"{title} by {x_label}: {words}", 600)


def _drawing(shown: Sequence[Series], x_label: str, logarithmic: bool) -> Markup:
    """Axes and lines."""
    xs = [point[0] for each in shown for point in each.points]
    lows, highs = (min(p[2] for e in shown for p in e.points), max(p[3] for e in shown for p in e.points))
    place = _Scale(_log(min(xs), logarithmic), _log(max(xs), logarithmic), lows, highs)
    parts = [*_axes(place, min(xs), max(xs), logarithmic)]
    for number, each in enumerate(shown):
        parts.append(_line(each, number, place, logarithmic))
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 4, escaped(x_label, 60)
        )
    )
    return Markup("").join(parts)


def bars(title: str, rows: Mapping[str, int], unit: str) -> Markup:
    """A figure with a bar, its value and its share for each row; the first row is the largest. Nothing without rows."""
    total = sum(rows.values())
    if not total:
        return Markup()
    largest, height = max(rows.values()), BAR * len(rows)
    parts = Markup("").join(
        Markup(
            '<text class="name" x="0" y="{}">{}</text><rect class="filled" x="{}" y="{}" width="{}" height="{}"/>'
            '<text class="tick" x="{}" y="{}">{} · {}</text>'
        ).format(
            BAR * n + 14, escaped(name, NAME_CHARACTERS), NAMES, BAR * n + 4, round(length, 1), BAR - 8,
            round(NAMES + length + 5, 1), BAR * n + 14, short(value), f"{value / total:.1%}",
        )
        for n, (name, value) in enumerate(rows.items())
        for length in [max(1.0, value / largest * (WIDTH - NAMES - VALUES))]
    )  # fmt: skip
    words = "; ".join(f"{name} {short(value)}" for name, value in rows.items())
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b> <small>{}</small></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(escaped(title, 80), unit, WIDTH, height, escaped(f"{title}: {words}", 600), parts)


@dataclass(frozen=True)
class _Scale:
    """Places in the drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (value - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _log(value: float, logarithmic: bool) -> float:
    return math.log10(max(value, 1e-12)) if logarithmic else value


def _axes(place: _Scale, first: float, last: float, logarithmic: bool) -> list[Markup]:
    lines = []
    for value in ticks(place.low, place.high, 5):
        y = round(place.y(value), 1)
        lines.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}" '
                'text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 5, y + 3.5, short(value))
        )
    values = ticks(place.first, place.last, 4)
    if logarithmic:
        exponents = range(math.floor(place.first), math.ceil(place.last) + 1)
        tens = [10.0**n for n in exponents if first <= 10.0**n <= last]
        values = tens if len(tens) > 1 else [first, last]
    for value in values:
        x = round(place.x(_log(value, logarithmic)), 1)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
        lines.append(text.format(x, HEIGHT - BOTTOM + 13, anchor, short(value)))
    return lines


def _line(series: Series, number: int, place: _Scale, logarithmic: bool) -> Markup:
    color = f"c{number % COLORS}" + (" dashed" if number >= COLORS else "")
    xs = [place.x(_log(point[0], logarithmic)) for point in series.points]
    if series.dots:
        return _dots(series, xs, place, f"c{number % COLORS}")
    path = _path((x, place.y(point[1])) for x, point in zip(xs, series.points, strict=True))
    parts = Markup()
    if any(point[2] < point[3] for point in series.points):
        upper = [(x, place.y(point[3])) for x, point in zip(xs, series.points, strict=True)]
        lower = [(x, place.y(point[2])) for x, point in zip(xs, series.points, strict=True)]
        parts += Markup('<polygon class="band {}" points="{}"/>').format(color, _path([*upper, *reversed(lower)]))
    if len(series.points) == 1:
        return parts + Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
            color, xs[0], place.y(series.points[0][1])
        )
    return parts + Markup('<polyline class="line {}" points="{}"/>').format(color, path)


def _dots(series: Series, xs: Sequence[float], place: _Scale, color: str) -> Markup:
    parts = Markup()
    for x, (_, y, low, high) in zip(xs, series.points, strict=True):
        if low < high:
            parts += Markup('<line class="line {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                color, x, x, place.y(low), place.y(high)
            )
        parts += Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(color, x, place.y(y))
    return parts


def _path(points: object) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)  # type: ignore[attr-defined]


def _legend(series: Sequence[Series], others: int) -> Markup:
    items = Markup("").join(
        Markup('<li><svg viewBox="0 0 18 6" aria-hidden="true"><line class="line c{}{}" x1="0" x2="18" y1="3" y2="3"/>'
               "</svg>{} <small>{}</small></li>").format(
            number % COLORS, " dashed" if number >= COLORS else "", escaped(each.label, 60), short(each.points[-1][1])
        )
        for number, each in enumerate(series)
    )  # fmt: skip
    rest = Markup("<li>and {} others</li>").format(others) if others else Markup()
    return Markup('<ul class="legend">{}{}</ul>').format(items, rest)


def _spoken(series: Series) -> str:
    (x, y, *_), (last_x, last_y, *_) = series.points[0], series.points[-1]
    return f"{series.label} from {short(y)} at {short(x)} to {short(last_y)} at {short(last_x)}"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within a range."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 1.5M, 20k, 0.25, 3e-05, 1e21."""
    size = abs(value)
    if size >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    for limit, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if sign == "k" else limit
            return f"{value / divisor:.4g}{sign}"
    return f"{value:.4g}" if size == 0 or size >= 1e-3 else f"{value:.2g}"


def interval_bar(value: float, low: float, high: float) -> Markup:
    """A share from 0 to 1 with its interval, as a small bar."""

    def at(share: float) -> float:
        return round(100 * min(1.0, max(0.0, share)), 1)

    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="ground" width="100" height="10"/><rect class="filled" width="{}" height="10"/>'
        '<line class="whisker" x1="{}" x2="{}" y1="5" y2="5"/></svg>'
    ).format(at(value), at(low), at(high))
