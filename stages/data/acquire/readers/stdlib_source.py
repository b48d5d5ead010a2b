"""Reader `stdlib-source`: code of the running Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pipeline.core.stage import added
from stages.data.acquire import python_stdlib
from stages.data.acquire.readers.base import Document, Files, SampledReader, Unmapped, Unreadable


class StdlibSource(SampledReader):
    """Functions and methods of the standard library, or its whole files.

    Docstrings are removed, so that no held-out docstring is trained on inside its function.
    """

    reader: Literal["stdlib-source"] = Field(description="selects this reader")
    unit: Literal["function", "file"] = added("function", "what one document is; use only one of them in a data recipe")
    modules: Literal["all", "top-level"] = Field("all", description="modules to read; top-level leaves packages out")

    def files(self, source: str) -> Files:
        return python_stdlib.library_files(top_level=self.modules == "top-level")

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unmapped | Unreadable]:
        return python_stdlib.read_modules(files) if self.unit == "file" else python_stdlib.read_functions(files)


READER = StdlibSource
