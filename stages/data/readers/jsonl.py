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
from stages.data.readers.base import Failed, Files
from stages.data.readers.rows import Row, RowReader


class Jsonl(RowReader):
    """JSON Lines files, plain or gzip; `path` is a file or a folder of *.jsonl and *.jsonl.gz."""

    suffixes: ClassVar = (".jsonl", ".jsonl.gz")

    reader: Literal["jsonl"] = Field(description="selects this reader")

    def rows(self, files: Files) -> Iterator[Row | Failed]:
        for relative, path in files:
            for number, line in _read_lines(path):
                name = f"{relative}:{number}"
                try:
                    fields = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
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


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise AtomError(f"{path} cannot be read at line {number + 1} ({error}); it is cut short or corrupt") from None


READER = Jsonl
