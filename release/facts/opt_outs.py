"""Opt-outs in the published data: the requests of the deny-list, and the documents that were removed for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release import data_layout
from release.facts.published_tables import read_json, stream_batches
from release.layout import OPT_OUTS
from stages.data.curate.deny_list import OPT_OUT_RULE

BATCH = 65_536
COLUMNS = ["id", "source", "rule", "match", "duplicate_of", "content_hash"]


@dataclass
class OptOut:
    """A request. request: the SHA-256 of its reference; date: as in the deny-list; entries: of the deny-list, by kind;
    removed: documents by how they were found: as named (`id`, `url`, …), or as `copy`, `near_duplicate`, `derived`."""

    request: str
    date: str
    entries: dict[str, int]
    removed: Counter[str] = field(default_factory=Counter)


def read_opt_outs(dataset: Path) -> list[OptOut]:
    """The requests of a dataset folder in the order of their hashes; none for a corpus without a deny-list."""
    if not (dataset / OPT_OUTS).exists():
        return []
    opt_outs = {
        row["request"]: OptOut(row["request"], row["date"], row["entries"])
        for row in read_json(dataset / OPT_OUTS)["requests"]
    }
    for row in removed_documents(dataset):
        for request in row["requests"]:
            if request in opt_outs:
                opt_outs[request].removed[row["found"]] += 1
    return [opt_outs[request] for request in sorted(opt_outs)]


def removed_documents(dataset: Path) -> Iterator[dict[str, Any]]:
    """The dispositions of the documents that were removed on request, with `found` and `requests` of their match."""
    import pyarrow.compute as pc

    for batch in stream_batches(data_layout.all_files(data_layout.disposition_files(dataset)), COLUMNS, BATCH):
        for row in batch.filter(pc.equal(batch.column("rule"), OPT_OUT_RULE)).to_pylist():
            kind, *requests = (row.pop("match") or "").split(" ")
            yield {**row, "found": kind, "requests": requests}
