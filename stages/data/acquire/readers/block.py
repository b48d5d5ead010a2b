"""Reader `datatrove`: files through a reader of datatrove, by its import path."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.core.bounds import Line
from pipeline.core.errors import AtomError
from stages.data.acquire.readers.base import Failed, Files
from stages.data.acquire.readers.row_files import Row, RowReader
from stages.data.blocks import Block, in_words

BASES = ("datatrove.pipeline.readers.base.BaseDiskReader",)
_ALL_FILES = "all files below `path` are read, or those of `pattern`"


class BlockReader(Block, RowReader):
    """Files through a reader of datatrove, such as datatrove.pipeline.readers.CSVReader; `path` is a file or a folder.

    The parameters of the class are written beside `block`. A document has the text and the id that the class gives it;
    the other settings name fields of its metadata. Rows that the class leaves out are counted as failed.
    """

    suffixes: ClassVar = ("",)
    refused: ClassVar[Mapping[str, str]] = {
        "data_folder": "use `path`",
        "paths_file": _ALL_FILES,
        "glob_pattern": "use `pattern`",
        "recursive": _ALL_FILES,
        "shuffle_files": "files are read in the order of their names",
        "skip": "use `limit`",
        "adapter": "a data recipe cannot state a function; extend the class in a folder of `extensions`",
        "file_progress": "progress is shown by part",
        "doc_progress": "progress is shown by part",
    }

    reader: Literal["datatrove"] = "datatrove"
    """selects this reader; `block` alone does so as well"""
    pattern: Line | None = None
    """pattern of paths below `path`; * matches / as well; null: all"""

    @property
    def names_files(self) -> bool:
        return False

    def inspect(self) -> str:
        self._create(Path())
        return f"block {self.block}: stock"

    def _create(self, folder: Path) -> Any:
        return self.create(BASES, "reader of files", data_folder=str(folder))

    def _walk(self, source: str, root: Path) -> Iterator[Path]:
        for path in super()._walk(source, root):
            if self.pattern is None or fnmatch.fnmatchcase(path.relative_to(root).as_posix(), self.pattern):
                yield path

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        for relative, path in files:
            count = 0
            # A reader of datatrove takes paths below its folder.
            block = self._create(path.parents[relative.count("/")])
            with _left_out(block, relative) as left_out:
                try:
                    for document in block.read_file(relative):
                        yield from _taken(left_out)
                        count += 1
                        fields = {**document.metadata, "text": document.text, "id": document.id}
                        yield Row(fields, relative, str(document.id))
                except AtomError:
                    raise
                except Exception as error:
                    raise AtomError(
                        f"{path} cannot be read by {self.class_name} after document {count}: {in_words(error)}"
                    ) from None
                yield from _taken(left_out)


@contextmanager
def _left_out(block: Any, file: str) -> Iterator[list[Failed]]:
    """Opens a context with the rows of a file that a reader leaves out.

    These are rows without text, and rows that it warns of.
    """
    from loguru import logger

    rows: list[Failed] = []
    number, convert = 0, block.get_document_from_dict

    def add(reason: str) -> None:
        nonlocal number
        number += 1
        rows.append(Failed(f"{file}#{number}", reason))

    def counted(*arguments: Any) -> Any:
        document = convert(*arguments)
        if document is None:
            add("it has no text")
        return document

    def hear(message: Any) -> None:
        text = " ".join(message.record["message"].split())
        if text.startswith("Error when reading"):
            add(text)
        elif "may be corrupted" in text:
            raise AtomError(f"{text}; it is cut short or corrupt")

    # datatrove drops rows without text silently, and only warns of rows that it cannot read.
    block.get_document_from_dict = counted
    logger.enable("datatrove")
    sink = logger.add(hear, level="WARNING", format="{message}", catch=False)
    try:
        yield rows
    finally:
        logger.remove(sink)


def _taken(rows: list[Failed]) -> list[Failed]:
    """Returns the rows since the last call."""
    taken, rows[:] = list(rows), []
    return taken
