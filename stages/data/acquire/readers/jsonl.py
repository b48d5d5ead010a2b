"""Reader `jsonl`: JSON Lines files, plain, gzip or Zstandard."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, ClassVar, Literal, cast

from pipeline.core.errors import AtomError
from stages.data.acquire.readers.base import Failed, Files
from stages.data.acquire.readers.rows import Row, RowReader

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
        from stages.data.acquire.readers.zstd import open_zstd

        return open_zstd(path)
    return open(path, "rb")
