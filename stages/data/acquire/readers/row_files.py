"""Readers `jsonl` and `parquet`: rows in files, JSON Lines also as gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, cast

from pipeline.core.errors import AtomError
from stages.data.acquire.readers.base import Failed, Files
from stages.data.acquire.readers.rows import Row, RowReader

# Bytes of memory that a frame may ask for: `zstd --ultra --long=31`, as some large corpora are packed.
MAX_WINDOW = 2**31
# Bytes of input at a time: a block of 4 bytes can hold 128 KiB, so a piece of output has at most 128 MiB.
CHUNK = 2**12


def open_zstd(path: Path) -> IO[bytes]:
    """Returns the decompressed bytes of a file.

    Reading raises EOFError if it is cut short, and OSError if it is corrupt.
    """
    return decompressed(open(path, "rb"))


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Returns the decompressed bytes of an open file, which is closed with the result.

    Errors are those of `open_zstd`.
    """
    return cast(IO[bytes], io.BufferedReader(_Decompressed(file), 2**20))


class _Decompressed(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._chunks, self._rest = file, _decompress(file), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompress(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the decompressed bytes in pieces that are not empty."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    frame = None
    try:
        while data := file.read(CHUNK):
            # A file may have several frames, as parallel compressors and concatenation write them.
            while data:
                frame = frame or decompressor.decompressobj()
                if piece := frame.decompress(data):
                    yield piece
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    # An open frame at the end of the file is a file that was cut short.
    if frame is not None:
        raise EOFError("the last frame does not end")


# Bytes of a line. A longer one fails alone, because a file of a megabyte can hold a line of a terabyte.
MAX_LINE = 2**28


class Jsonl(RowReader):
    """JSON Lines files, plain, gzip or Zstandard.

    `path` is a file or a folder of *.jsonl, *.jsonl.gz and *.jsonl.zst.
    """

    suffixes: ClassVar = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    reader: Literal["jsonl"]
    """selects this reader"""

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        for relative, path in files:
            for number, line in _read_lines(path):
                name = f"{relative}:{number}"
                if line is None:
                    yield Failed(name, f"longer than {MAX_LINE} bytes")
                    continue
                try:
                    fields = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    # Only the last line of a file can lack its end: then the file is cut short, and more may be
                    # missing.
                    if not line.endswith(b"\n"):
                        raise AtomError(
                            f"{path}, line {number}: not a JSON object ({error}); the file is cut short"
                        ) from None
                    yield Failed(name, f"not a JSON object: {error}")
                    continue
                if isinstance(fields, dict):
                    yield Row(fields, relative, name)
                else:
                    yield Failed(name, f"a JSON object is expected, not {type(fields).__name__}")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) of every line that is not blank; None for one that is too long."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE):
                number += 1
                # readline stops at the bound; the rest of such a line must not be read as lines of its own.
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield number, None
                elif line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise AtomError(f"{path} cannot be read at line {number + 1} ({error}); it is cut short or corrupt") from None


def _skip_line(file: IO[bytes]) -> None:
    """Reads up to the end of a line."""
    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
        pass


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        pass

        return open_zstd(path)
    return open(path, "rb")


class Parquet(RowReader):
    """Parquet files; `path` is a file or a folder of *.parquet."""

    suffixes: ClassVar = (".parquet",)

    reader: Literal["parquet"]
    """selects this reader"""

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for relative, path in files:
            number = 0
            try:
                parquet = pq.ParquetFile(path)
                names = self.columns if columns is None else columns
                places = {name: _column_to_read(parquet.schema_arrow, name) for name in names}
                missing = sorted(name for name, place in places.items() if place is None)
                if missing:
                    available = ", ".join(parquet.schema_arrow.names)
                    raise AtomError(
                        f"{path} has no column {missing[0]!r} (columns: {available}); set reader.text_field, id_field, "
                        "license_field, url_field, title_field or author_field"
                    )
                for batch in parquet.iter_batches(batch_size=1000, columns=list(places.values())):
                    for fields in _rows_of(batch):
                        number += 1
                        name = f"{relative}:{number}"
                        yield Failed(name, fields) if isinstance(fields, str) else Row(fields, relative, name)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                message = f"{path} cannot be read after row {number} ({reason}); it is cut short or not Parquet"
                raise AtomError(message) from None


def _column_to_read(schema: Any, path: str) -> str | None:
    """Returns the column that has the field of a path, alone where it is nested in columns without lists.

    None if there is none.
    """
    import pyarrow.types as types

    if path in schema.names:
        return path
    top, *names = path.split(".")
    if top not in schema.names:
        return None
    kind, has_list = schema.field(top).type, False
    for name in names:
        # Arrow reads a nested column by its path, but not through lists: then the top column is read as a whole.
        while types.is_list(kind) or types.is_large_list(kind):
            kind, has_list = kind.value_type, True
        position = kind.get_field_index(name) if types.is_struct(kind) else -1
        if position < 0:
            return None
        kind = kind.field(position).type
    return top if has_list else path


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yields the fields of each row, or the reason why a row has none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row: find the row, and keep the others
        for n in range(batch.num_rows):
            try:
                yield from batch.slice(n, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"a field is not UTF-8: {error}"
