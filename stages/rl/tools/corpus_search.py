"""Tool `search`: the passages of the corpus that match a query best, by BM25 (SQLite's FTS5).

The index has the documents of the training split that curation kept, cut into passages. It is made when the phase
starts, in its work folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName
from pipeline.core.stage import Inputs
from pipeline.core.store import Artifact
from stages.formats.table import part_files, sources_of, stream_parts
from stages.rl.tools.registry import Call, Result, Tool, ToolFailed

WORD = re.compile(r"\w+")
# Words of a query that count, which bounds its time.
MOST_WORDS = 32
# Most characters of a passage.
PASSAGE = 1000
SCHEMA = "CREATE VIRTUAL TABLE passages USING fts5(document UNINDEXED, text, tokenize='unicode61')"
# Equal scores are ordered by place, so that a query has one result.
QUERY = "SELECT document, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?"


class SearchTool(Tool):
    """A search in the documents that the model was trained on."""

    description: ClassVar = "Searches a collection of texts and returns the passages that match best."
    parameters: ClassVar = {"query": "words to search for"}
    inputs: ClassVar = {"documents": "dedup"}

    tool: Literal["search"]
    """selects this tool"""
    sources: tuple[SourceName, ...] = Field((), max_length=MOST_SOURCES)
    """sources of the data recipe to search; empty: all"""
    documents: Annotated[int, Range(1, 1e9)] = 100_000
    """maximum documents of each source, the first ones, which bounds the start of the phase"""
    passages: Annotated[int, Range(1, 1000)] = 3
    """maximum passages of a result"""

    def missing(self) -> str | None:
        reason = "the tool search needs SQLite with FTS5, and this Python has none ({}); use another one"
        try:
            import sqlite3
        except ImportError as error:
            return reason.format(error)
        # SQLite without FTS5 shows only when such a table is made.
        with closing(sqlite3.connect(":memory:")) as connection:
            try:
                connection.execute(SCHEMA)
            except sqlite3.OperationalError as error:
                return reason.format(error)
        return None

    @property
    def source_names(self) -> tuple[str, ...]:
        return self.sources

    def open(self, inputs: Inputs, folder: Path) -> Index:
        return Index(folder / "search.sqlite", self._passages(inputs["documents"]), self.passages)

    def _passages(self, documents: Artifact) -> Iterator[tuple[str, str]]:
        """Yields the id of a document and the text of a passage, in the order of the corpus."""
        kept = documents / "kept"
        for source in self.sources or sources_of(kept):
            count = 0
            for row in stream_parts(part_files(kept, source), ["id", "text", "split"]):
                if row["split"] != "train":
                    continue
                if count == self.documents:
                    break
                count += 1
                for passage in cut(row["text"], PASSAGE):
                    yield row["id"], passage


def cut(text: str, characters: int) -> Iterator[str]:
    """Yields the text in pieces of at most so many characters.

    A piece ends at a space where there is one in its second half.
    """
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            middle = start + characters // 2
            space = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
            end = end if space < 0 else space
        if piece := text[start:end].strip():
            yield piece
        start = end


class Index:
    """The running tool."""

    def __init__(self, file: Path, passages: Iterator[tuple[str, str]], most: int) -> None:
        """Makes the index of (document, passage). A result has at most `most` of them."""
        import sqlite3

        self.most, self.error = most, sqlite3.Error
        try:
            # Another thread than the one that makes the index may read it.
            self.connection = sqlite3.connect(file, check_same_thread=False)
            self.connection.execute("PRAGMA journal_mode = OFF")
            self.connection.execute("PRAGMA synchronous = OFF")  # made anew by each attempt
            self.connection.execute(SCHEMA)
            self.connection.executemany("INSERT INTO passages VALUES (?, ?)", passages)
            self.connection.commit()
        except self.error as error:
            raise ToolFailed(f"tool search: its index {file} cannot be made ({error}); see to the disk") from error

    def run(self, calls: Sequence[Call]) -> list[Result]:
        return [self._search(call.arguments["query"]) for call in calls]

    def _search(self, query: str) -> Result:
        words = list(dict.fromkeys(WORD.findall(query.lower())))[:MOST_WORDS]
        if not words:
            return Result("error", "the query has no word")
        try:
            # Each word in quotes: FTS5 would read some as operators.
            rows = self.connection.execute(QUERY, [" OR ".join(f'"{word}"' for word in words), self.most]).fetchall()
        except self.error as error:
            raise ToolFailed(f"tool search: its index cannot be read ({error}); see to the disk") from error
        if not rows:
            return Result("ok", "no passage has any of these words")
        return Result("ok", "\n\n".join(f"[{document}]\n{text}" for document, text in rows))

    def close(self) -> None:
        self.connection.close()
