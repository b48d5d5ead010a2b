"""Rows of large tables for checks: the next rows of a stream, and ids that occur twice, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from release.facts.published_tables import stream_batches

BATCH = 16_384
"""Rows that are read together."""
CANDIDATES = 100_000
"""The maximum number of hashes that are compared by their ids."""
HASHES = 100_000_000
"""The maximum number of hashes of ids in memory, of eight bytes each; more documents take several passes."""


class Rows:
    """The rows of a table in their order, of which `take` reads the next ones.

    path: a missing file has no rows. where: {column: the value of the rows to read}. aligned: whether the rows so far
    were the expected ones. stray: the id of the first one that was not.
    """

    def __init__(self, path: Path, columns: list[str], where: Mapping[str, str] | None = None) -> None:
        self.path, self.columns, self.aligned = path, columns, True
        self.stray: str | None = None
        self._batches = _batches_where(path, columns, where or {}) if path.exists() else iter(())
        self._rest: Any = None

    def take(self, count: int) -> Any:
        """The next rows, as a batch; fewer than `count` at the end."""
        import pyarrow as pa

        taken: list[Any] = []
        while count > 0:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._batches, None)
                if self._rest is None:
                    break
            rows = self._rest.slice(0, count)
            self._rest = self._rest.slice(len(rows))
            count -= len(rows)
            taken.append(rows)
        # of arrays: some functions of Arrow crash on a column of no chunks
        columns = [
            pa.concat_arrays([rows.column(name) for rows in taken] or [pa.array([], pa.string())])
            for name in self.columns
        ]
        return pa.RecordBatch.from_arrays(columns, names=self.columns)

    def next(self) -> dict[str, Any] | None:
        """The next row; None at the end."""
        rows = self.take(1).to_pylist()
        return rows[0] if rows else None


def _batches_where(path: Path, columns: list[str], where: Mapping[str, str]) -> Iterator[Any]:
    """Not a method: the generator would refer to the object that holds it, and both would stay in memory."""
    for batch in text_batches(path, [*columns, *where], BATCH):
        for name, value in where.items():
            batch = batch.filter(equals(batch.column(name), value))
        yield batch.select(columns)


def text_batches(files: Path | list[Path], columns: list[str], size: int = BATCH) -> Iterator[Any]:
    """Streams columns of text, which are of the type string even if they hold nothing but nulls."""
    import pyarrow as pa

    for batch in stream_batches(files, columns, size):
        texts = [column.cast(pa.string()) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(texts, names=columns)


def equals(column: Any, value: str) -> Any:
    """Where a column has a value; false for null."""
    import pyarrow.compute as pc

    return pc.fill_null(pc.equal(column, value), False)


def repeated_ids(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, id) of every row whose id occurred in an earlier row."""
    import numpy as np
    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(path).num_rows for path in files)
    passes = max(1, -(-total // HASHES))
    room = total if passes == 1 else 2 * (total // passes) + 1024
    candidates: set[int] = set()
    for number in range(passes):
        hashes, count = np.empty(room, np.int64), 0
        for _, _, values in _id_hashes(files):
            if passes > 1:
                values = values[values % passes == number]
            values = values[: room - count]  # more only if many are equal
            hashes[count : count + len(values)] = values
            count += len(values)
        hashes = hashes[:count]
        hashes.sort()
        repeated = hashes[1:][hashes[1:] == hashes[:-1]]
        candidates.update(repeated[: CANDIDATES - len(candidates)].tolist())
    if not candidates:
        return
    seen: set[str] = set()
    wanted = np.array(sorted(candidates), np.int64)
    for path, ids, values in _id_hashes(files):
        for position in np.flatnonzero(np.isin(values, wanted)).tolist():
            if (id := ids[position]) in seen:
                yield path, id
            seen.add(id)


def _id_hashes(files: list[Path]) -> Iterator[tuple[Path, list[str], Any]]:
    """(file, ids, their hashes in this process) by batch. Python's hash of a string is keyed, so no file can be made
    whose ids collide."""
    import numpy as np

    for path in files:
        for batch in text_batches(path, ["id"]):
            ids = batch.column("id").to_pylist()
            yield path, ids, np.fromiter(map(hash, ids), np.int64, len(ids))
