"""Reader `jsonl`: JSON Lines files, plain or gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.core.errors import AtomError
from stages.data.readers.base import Files
from stages.data.readers.rows import Row, RowReader


class Jsonl(RowReader):
    """JSON Lines files, plain or gzip; `path` is a file or a folder of *.jsonl and *.jsonl.gz."""

    suffixes: ClassVar = (".jsonl", ".jsonl.gz")

    reader: Literal["jsonl"] = Field(description="selects this reader")

    def rows(self, files: Files) -> Iterator[Row]:
        for relative, path in files:
            for number, line in _read_lines(path):
                place = f"{path}, line {number}"
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise AtomError(f"{place}: not a JSON object ({error}); the file is cut short or corrupt") from None
                if not isinstance(fields, dict):
                    raise AtomError(f"{place}: a JSON object is expected, not {type(fields).__name__}")
                yield Row(fields, place, relative, f"{relative}:{number}")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AtomError(f"{path} cannot be read at line {number} ({error}); it is not UTF-8, or corrupt") from None
    except (EOFError, OSError, zlib.error) as error:
        raise AtomError(f"{path} cannot be read at line {number + 1} ({error}); it is cut short or corrupt") from None


READER = Jsonl
