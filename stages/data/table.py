"""Parquet tables of the data stages: one schema each, one writer, errors with the name of the file.

Equal rows give equal bytes: fixed row groups, zstd, no pandas metadata, no clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_type_hints

from pipeline.core.errors import AtomError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 50_000

String = Annotated[str, "string"]
OptionalString = Annotated[str | None, "string"]
Int16 = Annotated[int, "int16"]
Int32 = Annotated[int, "int32"]
Int64 = Annotated[int, "int64"]
Double = Annotated[float, "double"]
OptionalDouble = Annotated[float | None, "double"]


class DocumentRow(TypedDict):
    """A document as acquired; docs/formats.md explains each column of this and the other tables."""

    id: String
    text: String
    source: String
    license: String
    origin: String
    content_hash: String
    prompt_chars: Int32


class KeptRow(DocumentRow):
    """A document after curation."""

    split: String


class DispositionRow(TypedDict):
    """The decision of curation about an input document."""

    id: String
    source: String
    license: String
    content_hash: String
    bytes: Int64
    disposition: String
    split: OptionalString
    rule: OptionalString
    value: OptionalDouble
    threshold: OptionalDouble
    duplicate_of: OptionalString
    match: OptionalString
    kept_hash: OptionalString


class ItemRow(TypedDict):
    """An evaluation problem."""

    id: String
    task: String
    prompt: String
    answer: String
    text: String


class TokenizedRow(TypedDict):
    """A document of a token shard."""

    source: String
    split: String
    ordinal: Int32
    id: String
    content_hash: String
    license: String
    bytes: Int64
    tokens: Int32
    loss_from: Int32


class OrderRow(TypedDict):
    """A segment of a training step."""

    step: Int32
    row: Int32
    segment: Int16
    source: String
    ordinal: Int32
    id: String
    offset: Int32
    length: Int32
    loss_from: Int32


def columns_of(row: type[Any]) -> dict[str, str]:
    """{column: Arrow type by name} of a table whose rows are such a TypedDict."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(row, include_extras=True).items()}


DOCUMENTS = columns_of(DocumentRow)
KEPT = columns_of(KeptRow)
DISPOSITIONS = columns_of(DispositionRow)
ITEMS = columns_of(ItemRow)
TOKENIZED = columns_of(TokenizedRow)
ORDER = columns_of(OrderRow)


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def arrow_schema(columns: Mapping[str, str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def write_rows(path: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows (dicts with exactly these columns)."""
    with row_writer(path, columns) as write:
        for row in rows:
            write(row)


@contextmanager
def row_writer(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A context with a function that writes one row and buffers a row group. The bytes are those of `write_table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(columns)
    buffer: list[Mapping[str, Any]] = []
    groups = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            nonlocal groups
            groups += 1
            writer.write_table(pa.Table.from_pylist(buffer, schema=schema), row_group_size=ROWS_PER_GROUP)
            buffer.clear()

        def write(row: Mapping[str, Any]) -> None:
            buffer.append(row)
            if len(buffer) == ROWS_PER_GROUP:
                flush()

        yield write
        if buffer or not groups:
            flush()


def write_table(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", row_group_size=ROWS_PER_GROUP)


def read_table(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """Reads a table. Raises AtomError with the file if it is missing, truncated or lacks one of the columns."""
    import pyarrow.parquet as pq

    with _read_errors(path):
        if filters is None:
            return pq.ParquetFile(path).read(columns=columns)
        return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def part_files(folder: Path, name: str) -> list[Path]:
    """The files of a table, in order: `<name>/part-*.parquet`, or the `<name>.parquet` of an earlier layout.

    Raises AtomError if there are none.
    """
    files = sorted((folder / name).glob("part-*.parquet")) or [folder / f"{name}.parquet"]
    if not files[-1].is_file():
        raise AtomError(f"{folder / name} holds no parts; run the stage that makes it again")
    return files


def stream_parts(files: Iterable[Path], columns: list[str]) -> Iterator[Any]:
    """The rows of several files of one table, as `stream_rows` gives those of each."""
    for path in files:
        yield from stream_rows(path, columns)


def slice_of(count: int, shard: int, shards: int) -> tuple[int, int]:
    """The first and last row (exclusive) of a shard of `count` rows; the shards partition the rows."""
    return count * shard // shards, count * (shard + 1) // shards


def read_shard(path: Path, shard: int, shards: int, columns: list[str] | None = None) -> list[Any]:
    """The rows of one shard, each a TypedDict of the table; reads only its row groups. Raises the errors of
    `read_table`."""
    import pyarrow.parquet as pq

    with _read_errors(path), pq.ParquetFile(path) as file:
        start, stop = slice_of(file.metadata.num_rows, shard, shards)
        groups: list[int] = []
        first, rows_before = start, 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if rows_before < stop and rows_before + rows > start:
                first = rows_before if not groups else first
                groups.append(number)
            rows_before += rows
        if not groups:
            return []
        table = file.read_row_groups(groups, columns=columns).slice(start - first, stop - start)
        result: list[Any] = table.to_pylist()
        return result


def stream_shards(path: Path, shards: int) -> Iterator[list[Any]]:
    """The rows of each shard in turn, as `read_shard` returns them; the file is read once."""
    import pyarrow.parquet as pq

    with _read_errors(path), pq.ParquetFile(path) as file:
        count, columns = file.metadata.num_rows, file.schema_arrow.names
    rows = stream_rows(path, columns)
    for shard in range(shards):
        start, stop = slice_of(count, shard, shards)
        yield list(islice(rows, stop - start))


def stream_rows(path: Path, columns: list[str]) -> Iterator[Any]:
    """The rows of a file of any size, a few thousand in memory at a time. Raises the errors of `read_table`."""
    import pyarrow.parquet as pq

    with _read_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise AtomError(f"{path} is missing; run the stage that makes it again") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AtomError(f"{path} cannot be read as Parquet ({reason}); rebuild it") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
