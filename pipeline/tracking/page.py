"""One self-contained HTML page of a run: no scripts, no external resources, and a size that does not grow with the run.

A running stage keeps `logs/<run>/status.html` up to date, and `atom status --html` writes it anywhere. It loads itself
again every `RELOAD` seconds until the run is over. Its Content-Security-Policy allows its own style sheet alone.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.json_files import printable
from pipeline.core.progress import duration, human
from pipeline.core.provenance import clock
from pipeline.core.text import escaped
from pipeline.tracking.snapshot import Snapshot, StageView

RELOAD = 30
MAX_ROWS, MAX_STAGES, MAX_CHARTS, MAX_TEXT = 200, 3, 12, 300
WIDTH, HEIGHT = 300, 90
STYLE = """
:root { color-scheme: light dark; --line: #0b62a8; --band: #0b62a833; --edge: #8885; --bad: #b3261e; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --line: #6cb6ff; --band: #6cb6ff33; --bad: #ff8a80; --good: #57d27b; }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 0.6rem 1rem 2rem; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.25rem 0.7rem 0.25rem 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; white-space: nowrap; }
td.text { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.failed, .lost, .damaged, .ending, .refused, .unsubmitted { color: var(--bad); font-weight: 600; }
.running { color: var(--line); font-weight: 600; } .sealed { color: var(--good); }
.charts { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; border: 1px solid var(--edge); border-radius: 6px; padding: 0.5rem; }
figcaption { display: flex; justify-content: space-between; } small { opacity: 0.75; }
svg { width: 100%; height: auto; display: block; } polyline { fill: none; stroke: var(--line); stroke-width: 1.5; }
polygon { fill: var(--band); } rect { fill: var(--band); } rect + rect { fill: var(--line); }
svg.bar { width: 5rem; height: 0.6rem; } ul { padding-left: 1.2rem; overflow-wrap: anywhere; }
"""


def _text(value: object) -> str:
    return escape(escaped(str(value))[:MAX_TEXT])


def chart(name: str, points: list[tuple[float, float, float, float]]) -> str:
    """A curve as inline SVG: the mean as a line, the extremes as a band."""
    first, last = points[0][0], points[-1][0]
    low, high = min(point[2] for point in points), max(point[3] for point in points)

    def place(step: float, value: float) -> str:
        x = (step - first) / (last - first or 1) * WIDTH
        y = HEIGHT - (value - low) / (high - low or 1) * HEIGHT if high > low else HEIGHT / 2
        return f"{x:.1f},{y:.1f}"

    band = [place(step, value) for step, _, _, value in points]
    band += [place(step, value) for step, _, value, _ in reversed(points)]
    line = " ".join(place(step, mean) for step, mean, _, _ in points)
    return (
        f"<figure><figcaption><b>{_text(name)}</b><span>{human(points[-1][1])}</span></figcaption>"
        f'<svg viewBox="-2 -3 {WIDTH + 4} {HEIGHT + 6}" role="img" aria-label="{_text(name)} by step">'
        f'<polygon points="{" ".join(band)}"/><polyline points="{line}"/></svg>'
        f"<figcaption><small>{human(low)} to {human(high)}</small><small>steps {first:.0f} to {last:.0f}</small>"
        "</figcaption></figure>"
    )


def _bar(done: float, total: float) -> str:
    share = min(1.0, max(0.0, done / total))
    return (
        f'<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label="{share:.0%}">'
        f'<rect width="100" height="12"/><rect width="{100 * share:.1f}" height="12"/></svg>'
    )


def _row(stage: StageView) -> str:
    s = stage.status
    took, left, _ = s.times
    progress = f"{_bar(s.done, s.total)} {_text(f'{s.done:g}/{s.total:g} {s.unit}')}" if s.total else ""
    state = s.state if (s.ranks or 1) == 1 else f"{s.state}, {s.ranks} ranks"
    cells = [_text(s.name), f'<span class="{_text(s.state.split()[0])}">{_text(state)}</span>']
    cells += [_text(" ".join(filter(None, (s.job, s.nodes)))), _text(s.restarts or ""), progress, took, left]
    return f'<tr>{"".join(f"<td>{cell}</td>" for cell in cells)}<td class="text">{_text(s.detail)}</td></tr>'


def _details(stage: StageView, now: float) -> str:
    """The curves of a stage, its latest notes, and the latest event of each kind that `atom` itself does not read."""
    assert stage.curves is not None
    charts = "".join(chart(name, stage.curves.points(name)) for name in stage.names()[:MAX_CHARTS])
    notes = [
        f"{duration(max(0.0, now - event['time']))} before: {event['text']}" for event in stage.events.state["notes"]
    ]
    if stage.status.slow:
        notes.append(stage.status.slow)
    for kind, event in stage.events.state["others"].items():
        values = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event"))
        notes.append(f"{kind}: {values}")
    items = "".join(f"<li>{_text(note)}</li>" for note in reversed(notes))
    counts = "".join(f" · {_text(count)}" for count in stage.counts())
    return f'<h2>{_text(stage.status.name)}{counts}</h2><div class="charts">{charts}</div><ul>{items}</ul>'


def page(snapshot: Snapshot) -> str:
    """The page, as a document of HTML."""
    sheet_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    rows = sorted(snapshot.stages, key=lambda stage: stage.status.state == "sealed")[:MAX_ROWS]
    shown = rows if len(rows) < len(snapshot.stages) else snapshot.stages
    sealed = sum(stage.status.state == "sealed" for stage in snapshot.stages)
    cut = f", {len(rows)} of them shown" if len(rows) < len(snapshot.stages) else ""
    heads = ("stage", "state", "job, nodes", "restarts", "progress", "time", "left", "")
    details = "".join(_details(stage, snapshot.time) for stage in snapshot.shown()[:MAX_STAGES])
    spending = "".join(f"<li>{_text(line)}</li>" for line in snapshot.spending_text())
    reload = "" if snapshot.over else f'<meta http-equiv="refresh" content="{RELOAD}">\n'
    lack = f"<p>{_text(snapshot.lack)}</p>" if snapshot.lack else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{sheet_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}<title>{_text(snapshot.run.id)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(snapshot.run.id)}</h1>
<p>{sealed} of {len(snapshot.stages)} stages sealed{cut}. Written at {clock(snapshot.time)}.</p>
{lack}<div class="scroll"><table>
<tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>
{"".join(map(_row, shown))}
</table></div>
<h2>Hours and money</h2>
<ul>{spending}</ul>
{details}
</body>
</html>
"""


def write(path: Path, text: str) -> None:
    """Writes a file atomically. Raises AtomError."""
    try:
        atomic_files.write(path, text)
    except OSError as error:
        raise AtomError(
            f"{printable(path)} cannot be written ({error.strerror}); name a file in a folder that you may write"
        ) from error
