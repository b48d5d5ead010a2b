"""The page of `atom pin --report`: what the samples of the sources of a data recipe say, for people."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
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
from stages.data.acquire.hub_files import LockedSource
from stages.data.acquire.source_probe import Probe

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
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    entries = hub_files.read(lock_of(recipe))
    probes = {name: entry.probe for name, entry in entries.items() if entry.probe and entry.probe.sampled_documents}
    details = [
        {"name": name, "problem": entry.probe.problem, "tables": _tables(entry.probe)}
        for name, entry in entries.items()
        if entry.probe
    ]
    page = environment.get_template("report.html.jinja").render(
        name=escaped(recipe.stem, 80),
        failure=failure,
        overview=_overview(entries),
        pictures=_pictures(probes) if probes else [],
        sources=details,
    )
    try:
        atomic_files.write(path, page)
    except OSError as error:
        raise AtomError(f"{escaped(str(path), 200)} cannot be written ({error.strerror}); name another file") from None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _kept(probe: Probe) -> str:
    """Returns the kept tokens with their interval."""
    if probe.kept_low is None or probe.kept_high is None:
        return f"{human(probe.kept_tokens)}, interval unknown"
    low, high = (human(end / probe.bytes_per_token) for end in (probe.kept_low, probe.kept_high))
    return f"{human(probe.kept_tokens)} ({low} to {high})"


def _overview(entries: Mapping[str, LockedSource]) -> Markup:
    head = ["source", "repository", "files", "bytes", "sample", "documents", "bytes of text", "kept", "tokens kept"]
    rows: list[list[str]] = [head]
    for name, entry in entries.items():
        files, probe = entry.rows(), entry.probe
        row = [name, f"{entry.repo}@{entry.revision[:12]}", f"{len(files):,}", human(sum(file.size for file in files))]
        if probe and probe.sampled_documents:
            sample = f"{probe.sampled_documents:,} documents ({probe.sampled}: {probe.pieces})"
            kept = _percent(probe.kept_bytes / probe.bytes) if probe.bytes else ""
            row += [sample, human(probe.documents), human(probe.bytes), kept, _kept(probe)]
        else:
            row += ["none", "unknown", "unknown", "unknown", "unknown"]
        rows.append(row)
    return markdown_html.table(rows)


def _tables(probe: Probe) -> list[tuple[str, Markup]]:
    """Returns the titles and tables of one source, without empty ones."""
    licenses = [
        [row.string or "none", row.license or "unknown, removed", _percent(row.share)] for row in probe.licenses
    ]
    removed = [
        [rule, f"{row.documents:,}", f"{_percent(row.low)} to {_percent(row.high)}"]
        for rule, row in probe.removed.items()
    ]
    counts = [
        ["secrets", f"{probe.secrets:,}"],
        ["copies within the sample", f"{probe.duplicates:,}"],
        *([f"copies of documents of {other}", f"{count:,}"] for other, count in probe.shared.items()),
        *([f"kept bytes in documents of more than {n} tokens", _percent(s)] for n, s in probe.long_documents.items()),
    ]
    tables = {
        "Licenses": [["as rows state it", "SPDX", "share of rows"], *licenses],
        "Removed by rule": [["rule", "documents of the sample", "share of the source"], *removed],
        "Languages": [["language", "share of bytes"], *([n, _percent(share)] for n, share in probe.languages.items())],
        "Found in the sample": [["what", "how many"], *counts],
        "Fields": [["field", "type"], *([name, kind] for name, kind in probe.fields.items())],
    }
    return [(title, markdown_html.table(rows)) for title, rows in tables.items() if len(rows) > 1]


def _pictures(probes: Mapping[str, Probe]) -> list[Markup]:
    names = list(probes)
    size = (8.0, 1.6 + 0.28 * len(names))
    captions: dict[str, Callable[[Figure], None]] = {
        "What becomes of the documents of the samples": lambda figure: _draw_removals(figure, probes),
        "Tokens of each source after curation, with intervals": lambda figure: _draw_tokens(figure, probes),
    }
    figure = Markup('<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>')
    return [
        figure.format(base64.b64encode(plots.png(size, paint)).decode(), caption, caption)
        for caption, paint in captions.items()
    ]


def _draw_removals(figure: Figure, probes: Mapping[str, Probe]) -> None:
    """Draws a bar for each source: the shares of documents that are kept, or removed by each rule."""
    totals: dict[str, int] = {}
    for probe in probes.values():
        for rule, row in probe.removed.items():
            totals[rule] = totals.get(rule, 0) + row.documents
    shown = sorted(totals, key=lambda rule: (-totals[rule], rule))[:MOST_RULES]
    shares: list[dict[str, float]] = []
    for probe in probes.values():
        removed = {rule: row.documents for rule, row in probe.removed.items()}
        parts = {"kept": probe.kept_documents, **{rule: removed.pop(rule, 0) for rule in shown}}
        parts["other rules"] = probe.sampled_documents - sum(parts.values())
        shares.append({name: count / probe.sampled_documents for name, count in parts.items()})
    axis: Any = figure.subplots()
    left = [0.0] * len(shares)
    for color, part in zip(plots.COLORS, shares[0], strict=False):
        widths = [row[part] for row in shares]
        axis.barh(list(probes), widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("share of sampled documents")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)


def _draw_tokens(figure: Figure, probes: Mapping[str, Probe]) -> None:
    """Draws the kept tokens of each source, on a logarithmic axis."""
    axis: Any = figure.subplots()
    for number, probe in enumerate(probes.values()):
        kept = max(probe.kept_tokens, 1)
        low, high = (
            kept if end is None else max(end / probe.bytes_per_token, 1) for end in (probe.kept_low, probe.kept_high)
        )
        error = [[max(0.0, kept - low)], [max(0.0, high - kept)]]
        axis.errorbar([kept], [number], xerr=error, color=plots.COLORS[0], **plots.POINTS)
    axis.set_yticks(range(len(probes)), list(probes))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("tokens")
