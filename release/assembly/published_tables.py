"""Reads the tables and JSON files of a release of any format, with present names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.store import FileRow
from release import schema

BATCH = 4096
"""Rows of a table that are unpacked together."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Manifest:
    """The manifest of an artifact, in evidence/manifests. node: what its file is called after; of an artifact of an
    earlier run, its key."""

    node: str
    key: str
    digest: str
    files: tuple[FileRow, ...]

    @classmethod
    def parse(cls, node: str, body: Any) -> Manifest:
        """body: the content of the file. Raises KeyError or TypeError for another shape."""
        files = tuple(FileRow(row["path"], row["size"], row["sha256"]) for row in body["files"])
        return cls(node, body["key"], body["digest"], files)

    @property
    def digests(self) -> dict[str, str]:
        """{path: SHA-256} of the files."""
        return {row.path: row.sha256 for row in self.files}


def read_manifests(release: Path) -> dict[str, Manifest]:
    """{node: manifest} of evidence/manifests."""
    paths = sorted((release / "evidence/manifests").glob("*.json"))
    return {path.stem: Manifest.parse(path.stem, read_json(path)) for path in paths}


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a published table, in the form of `stream_rows`."""
    return list(stream_rows(path, columns))


def stream_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Streams the rows of a published table; columns have present names for every format of the release. Raises
    CheckFailed if the table lacks a column."""
    for batch in stream_batches(path, columns, BATCH):
        yield from batch.to_pylist()


def stream_batches(path: Path, columns: list[str] | None, size: int) -> Iterator[Any]:
    """Streams the rows of a table as Arrow batches of at most `size` rows. Raises CheckFailed if it lacks a column."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        stored = schema.columns(path, columns if columns is not None else schema.today(path, names))
        if missing := sorted(set(stored.values()) - set(names)):
            raise CheckFailed(f"{path.name} has no column {missing[0]}")
        for batch in file.iter_batches(batch_size=size, columns=list(stored.values())):
            yield batch.select(list(stored.values())).rename_columns(list(stored))
