"""Reader `stdlib-docstrings`: docstrings of the running Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stages.data.acquire import python_stdlib
from stages.data.acquire.readers.base import Document, Files, SampledReader, Unmapped, Unreadable


class StdlibDocstrings(SampledReader):
    """Docstrings of modules, classes and functions of the running Python's standard library."""

    reader: Literal["stdlib-docstrings"] = Field(description="selects this reader")
    modules: Literal["all", "top-level"] = Field("all", description="modules to read; top-level leaves packages out")

    def files(self, source: str) -> Files:
        return python_stdlib.library_files(top_level=self.modules == "top-level")

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unmapped | Unreadable]:
        return python_stdlib.read_docstrings(files)


READER = StdlibDocstrings
