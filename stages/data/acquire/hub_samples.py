"""Samples of the files of a source: of the Hub by requests for ranges of their bytes, or on this machine.

Of Parquet files, a piece of a sample is the first rows of a random row group. A JSON Lines file that is compressed as a
whole can be read from its beginning only, so a piece is the first lines of a random file. Which files and row groups
these are depends on the label and the names alone. Files of other readers, such as packages, are on this machine: the
piece is a file, of which some documents are read.

A source of the Hub takes at most PIECES times MOST_BYTES from the network, in practice some MB, and at most SECONDS.
Memory holds one piece, and at most MOST_TEXT of its text.
"""

from __future__ import annotations

import gzip
import io
import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.text import printable
from pipeline.hub.client import RangedFile
from pipeline.hub.limits import Slot
from stages.data.acquire.hub_files import LockedSource
from stages.data.acquire.readers.base import Files, Reader
from stages.data.acquire.readers.hub import FORMATS, Hub
from stages.data.acquire.readers.row_files import RowReader, columns_to_read
from stages.formats.seeds import seed_of

# The pieces of the sample of a source; an interval is by their differences.
PIECES = 10
# The bytes of the beginning of a file, and the decoded bytes of a piece, of which whole rows are kept.
HEAD_BYTES, PIECE_BYTES = 2**20, 2**20
# The most bytes that are requested of a file or a row group, and the most text that they may decompress to.
MOST_BYTES, MOST_TEXT = 2**25, 2**26
# Other files than rows may be packages, which differ much. A sample has more than FILES of them if these have less
# than FEWEST_BYTES, and fewer, but at least two, beyond ENOUGH_BYTES, since some readers have to read all of a file.
FILES, FEWEST_BYTES, ENOUGH_BYTES = 40, 10 * 2**20, 2**28
# Bytes of a request to a column of a Parquet file.
BUFFER = 2**18
SECONDS = 300.0
TOO_MUCH = "too much for a sample; leave the file out by reader.pattern, or state the supply of the source"
# Files that may fail one after the other before the others are left out.
MOST_PROBLEMS = 3


@dataclass(frozen=True)
class Piece:
    """A part of a file that stands for a larger one.

    Attributes:
        file: The path of the file in its repository.
        path: The local file with its rows.
        rows: The rows of what the piece stands for: of a row group, or of the beginning of a file; None if it is the
            file itself.
        bytes: The bytes of that in the file.
    """

    file: str
    path: Path
    rows: int | None
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

    def add_fields(self, kinds: Mapping[str, str]) -> None:
        """Notes the types of fields by their names."""
        for name, kind in kinds.items():
            self.fields.setdefault(name[:1000], set()).add(kind[:1000])


class LocalFile(io.FileIO):
    """A file on this machine, to be read as a RangedFile is."""

    left = 0

    def __init__(self, path: str, place: Path) -> None:
        super().__init__(place)
        self.path, self.place, self.size = path, place, place.stat().st_size
        self.title = f"reading {printable(path)}"


AnyFile = RangedFile | LocalFile
Opened = AbstractContextManager[AnyFile]


def fetch(source: str, locked: LockedSource, reader: Hub, label: str, folder: Path, stopped: threading.Event) -> Sample:
    """Returns the sample of a source of the Hub; what cannot be read is among its problems.

    Args:
        source: The name of the source.
        locked: The pinned files.
        reader: The reader of the source.
        label: Decides what is sampled.
        folder: An empty folder for the pieces.
        stopped: No further file is begun after it is set.
    """
    sizes = {file.path: file.size for file in locked.rows()}
    with Slot(stopped) as slot:
        slot.take()
        deadline = time.monotonic() + SECONDS

        def opened(path: str) -> Opened:
            return nullcontext(RangedFile(locked.repo, locked.revision, path, sizes[path], deadline, MOST_BYTES, slot))

        return _sample(source, sizes, opened, reader, label, folder, stopped)


def take(source: str, files: Files, reader: Reader, label: str, folder: Path, stopped: threading.Event) -> Sample:
    """Returns the sample of a source whose files are on this machine, as `fetch`."""
    sizes, paths = {name: path.stat().st_size for name, path in files}, dict(files)
    return _sample(source, sizes, lambda name: LocalFile(name, paths[name]), reader, label, folder, stopped)


def format_of(reader: Reader) -> str:
    """Returns the format of the files of a reader: jsonl, parquet, or the name of another reader."""
    return reader.format if isinstance(reader, Hub) else reader.reader


def _sample(
    source: str,
    sizes: Mapping[str, int],
    opened: Callable[[str], Opened],
    reader: Reader,
    label: str,
    folder: Path,
    stopped: threading.Event,
) -> Sample:
    sample = Sample()
    files = sorted((path for path, size in sizes.items() if size), key=lambda path: seed_of(f"{label}/{path}", 0))
    for number, path in enumerate(files[: _number_of_files([sizes[path] for path in files], reader)]):
        place = folder / str(number)
        try:
            with opened(path) as file:
                if isinstance(reader, RowReader) and format_of(reader) == "parquet":
                    count = -(-PIECES // len(files))
                    _read_row_groups(file, reader, f"{label}/{path}", count, place, sample)
                elif format_of(reader) == "jsonl":
                    _read_head(file, place, sample)
                elif isinstance(file, LocalFile):
                    reader.pull(source, [(path, file.place)])
                    sample.pieces.append(Piece(path, file.place, None, file.size))
        except AtomError as error:
            # The reader's own sentences name the source already.
            sample.problems.append(f"source {source}: {str(error).removeprefix(f'source {source}: ')}")
            # What the network or the Hub did to these files, it would do to all others.
            if isinstance(error, MachineError) or (len(sample.problems) == MOST_PROBLEMS and not sample.pieces):
                break
        if stopped.is_set():
            break
    return sample


def _number_of_files(sizes: Sequence[int], reader: Reader) -> int:
    """Returns how many of the files of a reader, which have these sizes in their order, are sampled."""
    if format_of(reader) in FORMATS:
        return PIECES
    ends = enumerate(accumulate(sizes), start=1)
    return next((n for n, end in ends if end >= (FEWEST_BYTES if n >= FILES else ENOUGH_BYTES) and n > 1), len(sizes))


def _read_row_groups(remote: AnyFile, reader: RowReader, label: str, count: int, place: Path, sample: Sample) -> None:
    """Adds the first rows of some row groups of a Parquet file to a sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer, a column is requested as far as its rows are read.
        parquet = pq.ParquetFile(remote, buffer_size=BUFFER, pre_buffer=False)
        # Also of a file that lacks a column, whose sentence follows.
        sample.add_fields({column.name: str(column.type) for column in parquet.schema_arrow})
        columns = columns_to_read(remote.title, parquet.schema_arrow, reader.columns)
        groups = {n: parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)}
        total = sum(group.total_byte_size for group in groups.values())
        chosen = sorted((n for n, group in groups.items() if group.num_rows), key=lambda n: seed_of(f"{label}/{n}", 0))
        for number in chosen[:count]:
            group, path = groups[number], place.with_suffix(f".{number}.parquet")
            remote.left, mean = MOST_BYTES, max(1.0, group.total_byte_size / group.num_rows)
            if mean > MOST_BYTES:
                raise AtomError(f"{remote.title}: its rows have {mean / 1e6:.0f} MB each, {TOO_MUCH}")
            batches: list[pa.RecordBatch] = []
            rows = max(1, int(PIECE_BYTES / 4 / mean))
            for batch in parquet.iter_batches(rows, [number], columns, use_threads=False):
                batches.append(batch)
                if sum(each.nbytes for each in batches) >= PIECE_BYTES:
                    break
            pq.write_table(pa.Table.from_batches(batches), path)
            size = remote.size * group.total_byte_size / total
            sample.pieces.append(Piece(remote.path, path, group.num_rows, size))
    except (pa.ArrowException, OSError) as error:
        raise AtomError(f"{remote.title}: {' '.join(str(error).split())}; it is no Parquet") from None


def _read_head(remote: AnyFile, place: Path, sample: Sample) -> None:
    """Adds the first lines of a file to a sample, of which there is at least one."""
    data, text, whole, end = b"", b"", False, 0
    while not whole and not end:
        wanted = min(max(HEAD_BYTES, 8 * len(data)), MOST_BYTES, remote.size)
        if wanted == len(data):
            raise AtomError(f"{remote.title}: its first line is longer than {len(text):,} bytes, {TOO_MUCH}")
        data += remote.read(wanted - len(data))
        text, consumed, is_end = _decompressed(remote, data)
        whole = is_end and len(data) == remote.size
        end = len(text) if whole else text.rfind(b"\n") + 1
    # All lines say how many there are, and the first ones what they are.
    lines, path = text[:end], place.with_suffix(".jsonl")
    rows = sum(1 for line in lines.split(b"\n") if line.strip())
    if end > PIECE_BYTES:
        lines = lines[: max(lines.rfind(b"\n", 0, PIECE_BYTES), lines.find(b"\n")) + 1] or lines
    path.write_bytes(lines)
    # A first row that is no object, the reader counts as failed.
    with suppress(ValueError, RecursionError, AttributeError):
        sample.add_fields({name: _kind(value) for name, value in json.loads(lines.partition(b"\n")[0]).items()})
    sample.pieces.append(Piece(remote.path, path, rows, consumed * end / max(len(text), 1)))


def _kind(value: object) -> str:
    """Returns the type of a value of JSON."""
    return f"object of {', '.join(value)}" if isinstance(value, dict) else type(value).__name__


def _decompressed(remote: AnyFile, data: bytes) -> tuple[bytes, int, bool]:
    """Returns the text at the beginning of a file, the bytes that hold it, and True if it is all of these bytes."""
    raw = io.BytesIO(data)
    file: Any = raw
    if remote.path.endswith(".gz"):
        file = gzip.GzipFile(fileobj=raw)
    elif remote.path.endswith(".zst"):
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
