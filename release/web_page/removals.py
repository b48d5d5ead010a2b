"""What was removed, by rule, with the first documents of each rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release import data_layout
from release.assembly.published_tables import stream_batches

SAMPLES = 4
COLUMNS = ["id", "source", "rule", "bytes", "value", "threshold", "duplicate_of", "match"]


@dataclass
class Removal:
    """A rule: the number of documents and their bytes, and some of them as rows of COLUMNS. No text is among them:
    texts of removed documents are not published."""

    rule: str
    documents: int = 0
    bytes: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_removals(dataset: Path) -> list[Removal]:
    """The rules, that which removed the most first."""
    import pyarrow.compute as pc

    removals: dict[str, Removal] = {}
    files = data_layout.all_files(data_layout.disposition_files(dataset))
    for batch in stream_batches(files, [*COLUMNS, "disposition"], 65536):
        removed = batch.filter(pc.equal(batch.column("disposition"), "removed"))
        rules, sizes = removed.column("rule").to_pylist(), removed.column("bytes").to_pylist()
        for number, (rule, size) in enumerate(zip(rules, sizes, strict=True)):
            row = removals.setdefault(rule, Removal(rule))
            row.documents, row.bytes = row.documents + 1, row.bytes + size
            if len(row.samples) < SAMPLES:
                row.samples.append({name: removed.column(name)[number].as_py() for name in COLUMNS})
    return sorted(removals.values(), key=lambda row: (-row.documents, row.rule))
