"""Reads the tables and JSON files of a release of any format, with present names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.store import FileRow
from release import schema

BATCH, TEXT_BATCH = 4096, 256
"""Rows of a table that are unpacked together, and those of a table with texts, which may be long."""
ABSENT = {"part": 0}
"""{column: its value in tables of releases from before it}"""


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
        """body: the content of the file. Raises CheckFailed for another shape."""
        try:
            files = tuple(FileRow(row["path"], row["size"], row["sha256"]) for row in body["files"])
            return cls(node, body["key"], body["digest"], files)
        except (KeyError, TypeError):
            raise CheckFailed(f"evidence/manifests/{node}.json is no manifest of an artifact") from None

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


def stream_rows(
    files: Path | Iterable[Path], columns: list[str] | None = None, size: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Streams the rows of a published table, or of its parts; columns have present names for every format of the
    release. Raises CheckFailed if a file lacks a column. size: of rows in memory."""
    for batch in stream_batches(files, columns, size):
        yield from batch.to_pylist()


def stream_batches(files: Path | Iterable[Path], columns: list[str] | None, size: int) -> Iterator[Any]:
    """Streams the rows of a table, or of its parts, as Arrow batches of at most `size` rows. Raises CheckFailed if a
    file lacks a column."""
    for path in [files] if isinstance(files, Path) else files:
        yield from _file_batches(path, columns, size)


def _file_batches(path: Path, columns: list[str] | None, size: int) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        stored = schema.columns(path, columns if columns is not None else schema.today(path, names))
        absent = [name for name, column in stored.items() if column not in names and name in ABSENT]
        if missing := sorted({stored[name] for name in stored.keys() - absent} - set(names)):
            raise CheckFailed(f"{path.name} has no column {missing[0]}")
        present = [stored[name] for name in stored if name not in absent]
        for batch in file.iter_batches(batch_size=size, columns=present):
            default = {name: pa.array([ABSENT[name]] * len(batch), pa.int32()) for name in absent}
            arrays = [default[name] if name in default else batch.column(column) for name, column in stored.items()]
            yield pa.RecordBatch.from_arrays(arrays, names=list(stored))
