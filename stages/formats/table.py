"""Parquet tables of the data stages: one schema each, one writer, errors with the name of the file.

Equal rows give equal bytes: fixed row groups, zstd, no pandas metadata, no clock.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from pipeline.core.parts import part_tables

if TYPE_CHECKING:
    import pyarrow as pa


# The folder with what steps measured of documents that pass filtering, by part: a row for each row of its `kept`,
# with the id and the measures. Only sources with such steps have it.
MEASURES = "measures"
ROWS_PER_GROUP = 50_000
# Bytes of a table, or characters of text, after which a writer ends a row group early, to bound readers.
GROUP_BYTES = 2**25

String = Annotated[str, "string"]
OptionalString = Annotated[str | None, "string"]
Int16 = Annotated[int, "int16"]
Int32 = Annotated[int, "int32"]
Int64 = Annotated[int, "int64"]
Double = Annotated[float, "double"]
OptionalDouble = Annotated[float | None, "double"]

# The kind of a source's documents.
Kind = Literal["prose", "code", "problems", "chat"]
SPLITS = ("train", "heldout")
# Share of documents that are held out from training.
HeldoutFraction = Annotated[float, Range(0, 1, below=True)]


class DocumentRow(TypedDict):
    """A document as acquired. docs/formats.md shows the columns of the tables from here."""

    id: String
    """`<source>/<name>`: unique over all sources, the same in every run"""
    text: String
    """the document"""
    source: String
    """name of the source"""
    license: String
    """SPDX expression of the document; that of its source unless the document has one"""
    origin: String
    """the URL of a web document; else the source's origin, `#` and the file (or task) within it"""
    content_hash: String
    """SHA-256 of the text"""
    prompt_chars: Int32
    """leading characters that carry no loss in training; 0 for text"""


class FailedRow(TypedDict):
    """A document that could not be read; its license is that of its source."""

    id: String
    """`<source>/<file>:<line or row>`"""
    source: String
    """source of the row"""
    license: String
    """that of the source; LicenseRef-unmapped or LicenseRef-unknown-web where documents have their own"""
    reason: String
    """what is wrong with the row"""


class DerivedRow(TypedDict):
    """A document, and the id or URL of one that it was made from."""

    id: String
    """id of the document"""
    parent: String
    """id or URL of an original"""


class CreditRow(TypedDict):
    """A document, with its title and its authors as its source states them."""

    id: String
    """id of the document"""
    title: OptionalString
    """its title; null if the source states none"""
    author: OptionalString
    """its authors; null if the source states none"""


class GeneratedRow(TypedDict):
    """A text that a generator wrote, and how."""

    id: String
    """id of the text"""
    parent: String
    """id of the document that the model received"""
    generator: String
    """`generator` of the reader"""
    generator_digest: String
    """`tree_digest` of the source"""
    prompt: String
    """`prompt` of the reader, in which `{text}` stands for the document"""
    form: String
    """`chat` or `text`, as in the reader's settings"""
    temperature: Double
    """sampling temperature"""
    seed: Int64
    """seed of the text"""
    max_new_tokens: Int32
    """most tokens that it could have"""
    prompt_tokens: Int32
    """tokens of the prompt"""
    tokens: Int32
    """tokens of the text"""
    finished: Annotated[bool, "bool"]
    """whether the text ended by itself"""


class GeneratedText(GeneratedRow):
    """With the text and the license of the document; without a usable text the kind of refusal and its reason."""

    text: String
    license: String
    kind: String
    reason: String


class NoticeRow(TypedDict):
    """A file of a package with the text of a license or a notice, and the SHA-256 of the text."""

    sha256: String
    """SHA-256 of the text"""
    source: String
    """name of the source"""
    package: String
    """name of the package"""
    path: String
    """path of the file in the package"""
    text: String
    """text of the license or the notice"""


class KeptRow(DocumentRow):
    """A document after curation."""

    split: String


class DispositionRow(TypedDict):
    """The decision of curation about an input document."""

    id: String
    """id of the input document"""
    source: String
    """source of the input document"""
    license: String
    """license of the input document"""
    content_hash: String
    """SHA-256 of the text as acquired"""
    bytes: Int64
    """bytes of the text as acquired"""
    disposition: String
    """`kept` or `removed`"""
    split: OptionalString
    """`train` or `heldout`; null if removed"""
    rule: OptionalString
    """the rule that removed the document, below; null if kept"""
    value: OptionalDouble
    """the value that the rule measured; null if kept, and for a [block](curation.md) that states none"""
    threshold: OptionalDouble
    """the threshold that the value is compared with; null where `value` is"""
    duplicate_of: OptionalString
    """id of the document that was kept instead when the rule was applied"""
    match: OptionalString
    """id of the matching evaluation item; for the deny-list see below"""
    kept_hash: OptionalString
    """hash of the kept text; differs from `content_hash` if a step edited the text; null if removed"""


class GeneratedDispositionRow(DispositionRow):
    """The decision about a text that a generator wrote."""

    generator: String
    """only of [texts that a model wrote](synthetic-data.md): its name"""


class ItemRow(TypedDict):
    """An evaluation problem."""

    id: String
    """`<task>/<number>`"""
    task: String
    """name of the task"""
    prompt: String
    """the prompt"""
    answer: String
    """the correct answer"""
    text: String
    """the text that decontamination searches for"""


class TokenizedRow(TypedDict):
    """A document of a token shard."""

    source: String
    """source of the document"""
    split: String
    """`train` or `heldout`"""
    part: Int32
    """part of the source"""
    ordinal: Int32
    """number of its sequence in the shard of that split and part"""
    id: String
    """id of the document"""
    content_hash: String
    """SHA-256 of the kept text"""
    license: String
    """license of the document"""
    bytes: Int64
    """bytes of the kept text"""
    tokens: Int32
    """tokens of the whole sequence, with its last id"""
    loss_from: Int32
    """first token that carries loss"""


class OrderRow(TypedDict):
    """A segment of a training step."""

    step: Int32
    """step, from 1"""
    row: Int32
    """row of the step's global batch"""
    segment: Int16
    """place in the row; 0 unless rows are packed"""
    source: String
    """source of the document"""
    part: Int32
    """the part of the source, `train/<source>/part-<part>`"""
    ordinal: Int32
    """the number of the document's sequence in that part"""
    id: String
    """id of the document"""
    offset: Int32
    """first token of the segment in the document"""
    length: Int32
    """tokens of the segment, at most sequence_length + 1"""
    loss_from: Int32
    """number of leading targets, of `length - 1`, that carry no loss"""


def columns_of(row: type[Any]) -> dict[str, str]:
    """Returns {column: Arrow type by name} of a table whose rows are such a TypedDict."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(row, include_extras=True).items()}


DOCUMENTS = columns_of(DocumentRow)
FAILED = columns_of(FailedRow)
DERIVED = columns_of(DerivedRow)
CREDITS = columns_of(CreditRow)
GENERATED = columns_of(GeneratedRow)
GENERATED_TEXTS = columns_of(GeneratedText)
NOTICES = columns_of(NoticeRow)
KEPT = columns_of(KeptRow)
DISPOSITIONS = columns_of(DispositionRow)
GENERATED_DISPOSITIONS = columns_of(GeneratedDispositionRow)
ITEMS = columns_of(ItemRow)
TOKENIZED = columns_of(TokenizedRow)
ORDER = columns_of(OrderRow)


def content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_columns(buckets: int) -> dict[str, str]:
    """Returns the columns of the hashes of a source's filtered documents.

    `buckets` are those of MinHash, 0 for a source without a search for near duplicates.
    """
    return dict.fromkeys(["hash_high", "hash_low", *(f"band_{n:02d}" for n in range(buckets))], "uint64")


def short_hash(id: str) -> int:
    """Returns 64 bits that stand for an id where all ids of a corpus are compared."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big")


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
    """Opens a context with a function that writes one row.

    The function buffers a row group of at most GROUP_BYTES characters of text.

    The bytes are those of `write_table` where no row group has more.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(columns)
    buffer: list[Mapping[str, Any]] = []
    groups = characters = 0
    has_text = "text" in columns
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            nonlocal groups, characters
            groups, characters = groups + 1, 0
            writer.write_table(pa.Table.from_pylist(buffer, schema=schema), row_group_size=ROWS_PER_GROUP)
            buffer.clear()

        def write(row: Mapping[str, Any]) -> None:
            nonlocal characters
            buffer.append(row)
            characters += len(row["text"]) if has_text else 0
            if len(buffer) == ROWS_PER_GROUP or characters >= GROUP_BYTES:
                flush()

        yield write
        # A table without rows is a file as well: its schema tells the columns.
        if buffer or not groups:
            flush()


@contextmanager
def table_writer(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[pa.Table], None]]:
    """Opens a context with a function that writes the rows of a table.

    The table has these columns, in any order and of types that cast to theirs. The function buffers a row group, which
    ends when it has ROWS_PER_GROUP rows or GROUP_BYTES.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(columns)
    buffer, groups = schema.empty_table(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush(rows: int) -> None:
            nonlocal buffer, groups
            writer.write_table(buffer.slice(0, rows).combine_chunks(), row_group_size=ROWS_PER_GROUP)
            buffer, groups = buffer.slice(rows), groups + 1

        def write(table: pa.Table) -> None:
            nonlocal buffer
            buffer = pa.concat_tables([buffer, table.select(schema.names).cast(schema)])
            while buffer.num_rows >= ROWS_PER_GROUP:
                flush(ROWS_PER_GROUP)
            # Rows of long texts end a group early, or a reader would need gigabytes for one.
            if buffer.nbytes >= GROUP_BYTES:
                flush(buffer.num_rows)

        yield write
        if buffer.num_rows or not groups:
            flush(buffer.num_rows)


def write_table(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    # Metadata of pandas would make the bytes depend on the way in which the table was made.
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", row_group_size=ROWS_PER_GROUP)


def read_table(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """Reads a table. Raises AtomError with the file if it is missing, truncated or lacks one of the columns."""
    import pyarrow.parquet as pq

    with read_errors(path):
        if filters is None:
            return pq.ParquetFile(path).read(columns=columns)
        return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def require_columns(path: Path, schema: pa.Schema) -> None:
    """Raises AtomError if a table lacks a column, or has one of another type."""
    import pyarrow.parquet as pq

    with read_errors(path):
        present = pq.read_schema(path)
    for field in schema:
        if field.name not in present.names or present.field(field.name).type != field.type:
            raise AtomError(f"{path} has no column {field.name} of type {field.type}, which is needed here")


def part_files(folder: Path, name: str) -> list[Path]:
    """Lists the files of a table, `<name>/part-*.parquet`, in order. Raises AtomError if there are none."""
    files = part_tables(folder / name)
    if not files:
        raise AtomError(f"{folder / name} holds no parts; run the stage that makes it again")
    return files


def sources_of(folder: Path) -> list[str]:
    """Lists the names of the sources that have a table in the folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def order_files(folder: Path) -> list[Path]:
    """Lists the files of the order of a phase in the order of steps. Raises AtomError if there are none."""
    files = part_tables(folder)
    if not files:
        raise AtomError(f"{folder} holds no order; run the stage that makes it again")
    return files


def column_names(path: Path) -> list[str]:
    """Returns the columns of a table. Raises the errors of `read_table`."""
    import pyarrow.parquet as pq

    with read_errors(path):
        names: list[str] = pq.read_schema(path).names
        return names


def stream_rows(path: Path, columns: list[str]) -> Iterator[Any]:
    """Yields the rows of a file of any size, a few thousand in memory at a time. Raises the errors of `read_table`."""
    for batch in stream_batches(path, columns):
        yield from batch.to_pylist()


def stream_batches(path: Path, columns: list[str], rows: int = 4096) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file of any size as Arrow batches of at most `rows`, each of one row group.

    Raises the errors of `read_table`.
    """
    import pyarrow.parquet as pq

    with read_errors(path), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # a batch over several groups may hold far more text than one
            yield from file.iter_batches(batch_size=rows, columns=columns, row_groups=[group])


def stream_part_batches(files: Iterable[Path], columns: list[str], rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """Yields the rows of several files of one table, as `stream_batches` gives those of each."""
    for path in files:
        yield from stream_batches(path, columns, rows)


def rows_at(path: Path, numbers: Sequence[int], columns: list[str]) -> Iterator[Any]:
    """Yields the rows of a file with these increasing numbers, from 0; reads the row groups that hold them.

    Raises the errors of `read_table`.
    """
    import pyarrow.parquet as pq

    with read_errors(path), pq.ParquetFile(path) as file:
        first = position = 0
        for group in range(file.num_row_groups):
            start, end = position, first + file.metadata.row_group(group).num_rows
            # Numbers ascend, so each row group is read at most once.
            position = bisect_left(numbers, end, start)
            if position > start:
                rows = [number - first for number in numbers[start:position]]
                yield from file.read_row_group(group, columns=columns).take(rows).to_pylist()
            first = end


def row_count(path: Path) -> int:
    """Returns the number of rows of a file. Raises the errors of `read_table`."""
    import pyarrow.parquet as pq

    with read_errors(path):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
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


def split_of(hash: str, heldout_fraction: float) -> str:
    """Returns the split of a document, by the hash of its text or of its work only."""
    return "heldout" if int(hash[:16], 16) < heldout_fraction * 2**64 else "train"
