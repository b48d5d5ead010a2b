"""The page of `atom pin --report`: what the samples of the sources of a data recipe say, for people."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.progress import human
from pipeline.core.text import escaped
from pipeline.graph.recipe import lock_of
from release.cards import plots
from release.web_page import markdown_html
from stages.data.acquire import hub_files
from stages.data.acquire.hub_files import LocalSource, LockedSource
from stages.data.acquire.source_probe import Probe
from stages.data.recipe import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
STYLE = FOLDER.parent / "web_page"
"""The folder with the style of the page of a release."""
MOST_RULES = len(plots.COLORS) - 2
"""Rules with a color of their own; the others share one."""


def write_page(path: Path, recipe: Path, failure: str) -> None:
    """Writes the page about the sources in the lock file of a data recipe.

    Args:
        path: The page.
        recipe: The data recipe.
        failure: What could not be pinned or used, in a sentence; empty if nothing.

    Raises:
        AtomError: The page cannot be written, or matplotlib is not installed.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([FOLDER, STYLE])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    lock = lock_of(recipe)
    entries: dict[str, LockedSource | LocalSource] = {**hub_files.read(lock), **hub_files.read_local(lock)}
    probes = {name: entry.probe for name, entry in entries.items() if entry.probe}
    data = load(recipe)
    sources = {source.name: source for source in data.sources}
    page = environment.get_template("report.html.jinja").render(
        name=escaped(recipe.stem, 80),
        failure=failure,
        overview=_overview(entries),
        picture=_picture({name: probe for name, probe in probes.items() if probe.sampled_documents}),
        probes={
            name: (data.problem_of(sources[name], probe) if name in sources else probe.problem, _details(probe))
            for name, probe in probes.items()
        },
    )
    try:
        atomic_files.write(path, page)
    except OSError as error:
        raise AtomError(f"{escaped(str(path), 200)} cannot be written ({error.strerror}); name another file") from None


def _overview(entries: Mapping[str, LockedSource | LocalSource]) -> Markup:
    """Returns the table with a row for each source."""
    head = ["source", "repository", "files", "bytes", "sample", "documents", "bytes of text", "kept", "tokens kept"]
    rows: list[list[str]] = [head]
    for name, entry in entries.items():
        probe = entry.probe
        row = [name, entry.place, f"{entry.file_count:,}", human(entry.bytes)]
        if probe and probe.sampled_documents:
            low, high = (
                "unknown" if end is None else human(end / probe.bytes_per_token)
                for end in (probe.kept_low, probe.kept_high)
            )
            row += [f"{probe.sampled_documents:,} documents ({probe.sampled}: {probe.pieces})", human(probe.documents)]
            row += [human(probe.bytes), f"{probe.kept_bytes / max(probe.bytes, 1):.1%}"]
            row.append(f"{human(probe.kept_tokens)} ({low} to {high})")
        rows.append(row + ["unknown"] * (len(head) - len(row)))
    return markdown_html.table(rows)


def _details(probe: Probe) -> Markup:
    """Returns the table with all that is known of one source."""
    rows = [["", "of", "figure"]]
    for field, value in probe.model_dump(exclude={"settings", "problem"}).items():
        entries = {"": value}
        if isinstance(value, dict):
            entries = value
        elif field == "licenses":
            entries = {row.string or "none": f"{row.license or 'removed'}: {row.share:.4g}" for row in probe.licenses}
        for name, figure in entries.items():
            text = ", ".join(f"{n} {x}" for n, x in figure.items()) if isinstance(figure, dict) else str(figure)
            rows.append([field.replace("_", " "), str(name), text])
    return markdown_html.table(rows)


def _picture(probes: Mapping[str, Probe]) -> Markup:
    """Returns what becomes of the sampled documents, and the tokens that are kept; nothing without a sample."""
    if not probes:
        return Markup()

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_removals(left, probes)
        for number, probe in enumerate(probes.values()):
            kept = max(probe.kept_tokens, 1)
            ends = [
                kept if end is None else max(end / probe.bytes_per_token, 1)
                for end in (probe.kept_low, probe.kept_high)
            ]
            error = [[max(0.0, kept - ends[0])], [max(0.0, ends[1] - kept)]]
            right.errorbar([kept], [number], xerr=error, color=plots.COLORS[0], **plots.POINTS)
        right.set_xscale("log")
        right.set_xlabel("tokens kept, with interval")
        left.invert_yaxis()  # of both
        figure.legend(loc="outside lower center", ncols=3, fontsize=7)

    caption = "What becomes of the documents of the samples, and the tokens of each source after curation"
    data = base64.b64encode(plots.png((9.0, 1.8 + 0.28 * len(probes)), paint)).decode()
    figure = Markup('<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>')
    return figure.format(data, caption, caption)


def _draw_removals(axis: Any, probes: Mapping[str, Probe]) -> None:
    """Draws a bar for each source: the shares of documents that are kept, or removed by each rule."""
    totals = Counter[str]()
    for probe in probes.values():
        totals.update({rule: row.documents for rule, row in probe.removed.items()})
    rules = sorted(totals, key=lambda rule: (-totals[rule], rule))[:MOST_RULES]
    left = [0.0] * len(probes)
    for color, part in zip(plots.COLORS, ["kept", *rules, "other rules"], strict=False):
        widths = []
        for start, probe in zip(left, probes.values(), strict=True):
            removed = {rule: row.documents for rule, row in probe.removed.items()}
            count = probe.kept_documents if part == "kept" else removed.get(part, 0)
            widths.append(1 - start if part == "other rules" else count / probe.sampled_documents)
        axis.barh(list(probes), widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_xlabel("share of sampled documents")
