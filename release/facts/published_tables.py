"""Reads the tables, the JSON files and the manifests of a release."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.store import FileRow

BATCH, TEXT_BATCH = 4096, 256
"""Rows of a table that are unpacked together, and those of a table with texts, which may be long."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def to_json(value: Any, sort_keys: bool = True) -> bytes:
    """Returns the bytes of a published JSON file. Not a number is refused, since parsers read it differently."""
    return (json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Manifest:
    """The manifest of an artifact, in evidence/manifests.

    Attributes:
        node: The name of its file: the node, or of an artifact of an earlier run its key.
        key: The key of the artifact.
        digest: Its digest.
        files: Its files.
    """

    node: str
    key: str
    digest: str
    files: tuple[FileRow, ...]

    @classmethod
    def parse(cls, node: str, body: Any) -> Manifest:
        """Reads the content of a manifest. Raises CheckFailed if it has another shape."""
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
    """Returns {node: manifest} of evidence/manifests."""
    paths = sorted((release / "evidence/manifests").glob("*.json"))
    return {path.stem: Manifest.parse(path.stem, read_json(path)) for path in paths}


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Returns all rows of a published table, in the form of `stream_rows`."""
    return list(stream_rows(path, columns))


def stream_rows(
    files: Path | Iterable[Path], columns: list[str] | None = None, size: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Streams the rows of a published table, or of its parts; `size` of them are in memory.

    Raises CheckFailed if a file lacks a column.
    """
    for batch in stream_batches(files, columns, size):
        yield from batch.to_pylist()


def stream_batches(files: Path | Iterable[Path], columns: list[str] | None, size: int) -> Iterator[Any]:
    """Streams the rows of a table, or of its parts, as Arrow batches of at most `size` rows.

    Raises CheckFailed if a file lacks a column.
    """
    import pyarrow.parquet as pq

    for path in [files] if isinstance(files, Path) else files:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else columns
            if missing := sorted({*wanted} - {*names}):
                raise CheckFailed(f"{path.name} has no column {missing[0]}")
            for batch in file.iter_batches(batch_size=size, columns=wanted):
                # The columns come in the order of the file, and callers expect that of their request.
                yield batch.select(wanted)
