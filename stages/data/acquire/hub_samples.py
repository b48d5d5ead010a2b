"""Samples of the files of a dataset on the Hub, which are read by requests for ranges of their bytes.

Of Parquet files, a piece of a sample is the first rows of a random row group. A JSON Lines file that is compressed as a
whole can be read from its beginning only, so a piece is the first lines of a random file. Which files and row groups
these are depends on the label and the names alone.

A source takes at most PIECES times MOST_BYTES from the network, in practice some MB, and at most SECONDS. Memory holds
one piece, and at most MOST_TEXT of its text. Pieces are kept beside pulled files, by the digest of their file: the same
sample is not requested twice.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.store import canonical, sha256_bytes
from pipeline.core.text import escaped
from pipeline.hub.client import RangedFile
from stages.data.acquire.hub_files import LockedFile, LockedSource
from stages.data.acquire.readers.hub import Hub
from stages.data.acquire.readers.row_files import columns_to_read
from stages.formats.seeds import seed_of

VERSION = 1
# The pieces of the sample of a source; an interval is by their differences.
PIECES = 10
# The bytes of the beginning of a file, and the decoded bytes of a piece, of which whole rows are kept.
HEAD_BYTES, PIECE_BYTES = 2**20, 2**20
# The most bytes that are requested for a piece, and the most text that they may decompress to.
MOST_BYTES, MOST_TEXT = 2**25, 2**26
# Bytes of a request to a column of a Parquet file.
BUFFER = 2**18
SECONDS = 300.0
MOST_FIELDS = 100
JSON_TYPES = {str: "string", bool: "bool", int: "int64", float: "double", list: "list", type(None): "null"}


@dataclass(frozen=True)
class Piece:
    """A part of a file that stands for a larger one.

    Attributes:
        file: The path of the file in its repository.
        path: The local file with its rows.
        rows: The rows of what the piece stands for: of a row group, or of the lines of the piece.
        bytes: The bytes of that in the file.
    """

    file: str
    path: Path
    rows: int
    bytes: float


@dataclass
class Sample:
    """The pieces of a source.

    Attributes:
        pieces: The pieces, in an order that does not depend on time.
        fields: {field of the rows: its types}.
        problems: Sentences on files that could not be read.
    """

    pieces: list[Piece] = field(default_factory=list)
    fields: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def fetch(source: str, locked: LockedSource, reader: Hub, label: str, stopped: threading.Event) -> Sample:
    """Returns the sample of a source; what cannot be read is among its problems.

    Args:
        source: The name of the source.
        locked: The pinned files.
        reader: The reader of the source.
        label: Decides what is sampled.
        stopped: No request is begun after it is set.
    """
    deadline, sample = time.monotonic() + SECONDS, Sample()
    files = sorted((file for file in locked.rows() if file.size), key=lambda file: seed_of(f"{label}/{file.path}", 0))
    settings = [VERSION, label, reader.format, reader.columns]
    for file in files[:PIECES]:
        folder = reader.place(file).parent / f"sample-{sha256_bytes(canonical(settings))[:16]}"
        try:
            if not folder.exists():
                remote = RangedFile(locked.repo, locked.revision, file.path, file.size, deadline, MOST_BYTES)
                _save(folder, _pieces(remote, file, reader, label, -(-PIECES // len(files)), sample))
            _add(sample, folder, file)
        except AtomError as error:
            sample.problems.append(f"source {source}: {error}")
            # What the network or the Hub did to these files, it would do to all others.
            if isinstance(error, MachineError) or (len(sample.problems) == 3 and not sample.pieces):
                break
        if stopped.is_set():
            break
    return sample


def _add(sample: Sample, folder: Path, file: LockedFile) -> None:
    """Adds the pieces of a file that lie in a folder."""
    for facts in json.loads((folder / "pieces.json").read_bytes()):
        sample.pieces.append(Piece(file.path, folder / facts["name"], facts["rows"], facts["bytes"]))
        _add_fields(sample, facts["fields"])


def _add_fields(sample: Sample, fields: dict[str, str]) -> None:
    for name, kind in fields.items():
        if name in sample.fields or len(sample.fields) < MOST_FIELDS:
            sample.fields.setdefault(name, set()).add(kind)


def _save(folder: Path, pieces: Iterator[tuple[dict[str, Any], Any]]) -> None:
    """Writes the pieces of a file: facts, and lines or a table. The folder is there with all of them, or not at all."""
    import pyarrow.parquet as pq

    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        rows = []
        for number, (facts, content) in enumerate(pieces):
            name = f"{number}.jsonl" if isinstance(content, bytes) else f"{number}.parquet"
            if isinstance(content, bytes):
                (draft / name).write_bytes(content)
            else:
                pq.write_table(content, draft / name)
            rows.append({"name": name, **facts})
        (draft / "pieces.json").write_text(json.dumps(rows))
        # Another process may have written the same ones meanwhile.
        if not folder.exists():
            os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _pieces(
    remote: RangedFile, file: LockedFile, reader: Hub, label: str, count: int, sample: Sample
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields the facts and the content of at most `count` pieces of a file; the fields go into the sample at once."""
    if reader.format == "parquet":
        yield from _row_groups(remote, file, reader, f"{label}/{file.path}", count, sample)
    else:
        yield _head(remote, file)


def _row_groups(
    remote: RangedFile, file: LockedFile, reader: Hub, label: str, count: int, sample: Sample
) -> Iterator[tuple[dict[str, Any], Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer, a column is requested as far as its rows are read.
        parquet = pq.ParquetFile(remote, buffer_size=BUFFER, pre_buffer=False)
        kinds = zip(parquet.schema_arrow.names, parquet.schema_arrow.types, strict=True)
        fields = {escaped(name, 100): escaped(str(kind), 100) for name, kind in kinds}
        # Also of a file that lacks a column, whose sentence follows.
        _add_fields(sample, fields)
        columns = columns_to_read(remote.title, parquet.schema_arrow, reader.columns)
        groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
        total = sum(group.total_byte_size for group in groups)
        chosen = sorted(
            (n for n, group in enumerate(groups) if group.num_rows), key=lambda n: seed_of(f"{label}/{n}", 0)
        )
        for number in chosen[:count]:
            group = groups[number]
            remote.left = MOST_BYTES
            mean_bytes = group.total_byte_size / group.num_rows
            if mean_bytes > MOST_BYTES:
                raise AtomError(f"{remote.title}: its rows have {mean_bytes / 1e6:.0f} MB each, too much for a sample")
            batches, size = [], 0
            for batch in parquet.iter_batches(
                max(1, int(PIECE_BYTES / 4 / max(mean_bytes, 1))), [number], columns, use_threads=False
            ):
                batches.append(batch)
                size += batch.nbytes
                if size >= PIECE_BYTES:
                    break
            share = group.total_byte_size / total
            facts = {"rows": group.num_rows, "bytes": share * file.size, "fields": fields}
            yield facts, pa.Table.from_batches(batches)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise AtomError(f"{remote.title}: {reason}; it is no Parquet") from None


def _head(remote: RangedFile, file: LockedFile) -> tuple[dict[str, Any], bytes]:
    """Returns the facts and the lines of the beginning of a file, of which there is at least one."""
    data, whole = b"", False
    while not whole:
        wanted = min(max(HEAD_BYTES, 8 * len(data)), MOST_BYTES, file.size)
        if wanted == len(data):
            raise AtomError(f"{remote.title}: its first line is longer than {wanted} bytes, too much for a sample")
        data += remote.read(wanted - len(data))
        text, consumed, is_end = _decompressed(remote, data, file.path)
        whole = is_end and len(data) == file.size
        end = len(text) if whole else text.rfind(b"\n") + 1
        if end:
            break
    # All lines say how many there are, and the first ones what they are.
    lines = text[:end]
    rows = sum(1 for line in lines.split(b"\n") if line.strip())
    if end > PIECE_BYTES:
        lines = lines[: max(lines.rfind(b"\n", 0, PIECE_BYTES), lines.find(b"\n")) + 1] or lines
    facts = {"rows": rows, "bytes": consumed * end / max(len(text), 1), "fields": _fields_of(lines)}
    return facts, lines


def _decompressed(remote: RangedFile, data: bytes, name: str) -> tuple[bytes, int, bool]:
    """Returns the text at the beginning of a file, the bytes that hold it, and True if it is all of these bytes."""
    raw = io.BytesIO(data)
    file: Any = raw
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        import pyarrow as pa

        file = pa.CompressedInputStream(raw, "zstd")
    text = bytearray()
    try:
        while len(text) < MOST_TEXT:
            # Smaller than what is wanted, since a text that is cut loses the last chunk.
            chunk = file.read(2**12)
            if not chunk:
                return bytes(text), len(data), True
            text += chunk
    except (EOFError, OSError, zlib.error) as error:
        # The beginning of a file is cut within a block (Zstandard: 128 KiB of text); what came before is good.
        if not text:
            raise AtomError(f"{remote.title}: {error}; it is not compressed as its name says") from None
        return bytes(text), len(data), False
    return bytes(text), raw.tell(), False


def _fields_of(lines: bytes) -> dict[str, str]:
    """Returns the types of the fields of the first rows, those of a nested one by their path."""
    types = dict[str, set[str]]()
    for line in lines.split(b"\n", MOST_FIELDS)[:MOST_FIELDS]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for name, value in row.items() if isinstance(row, dict) else ():
            nested = (
                {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
            )
            for path, each in nested.items():
                types.setdefault(escaped(path, 100), set()).add(JSON_TYPES.get(type(each), "struct"))
    return {name: "|".join(sorted(kinds)) for name, kinds in list(types.items())[:MOST_FIELDS]}
