"""Documents that contain a span of text exactly: SQLite's FTS5 narrows by trigrams, and every candidate is compared.

`atom build` makes the index; for other data the first query does. Measured on two shared cores: indexing takes 1 s for
20 MB of text and 14 s for 203 MB, and the index has a quarter of the size of the text. The query of an absent span
takes a millisecond, and reading every text 0.03 and 0.7 s. By these figures ten million documents of 3 kB take half an
hour and 8 GB, once for each version of the data.
"""

from __future__ import annotations

import os
import sqlite3
from array import array
from bisect import bisect, bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.store import canonical, sha256_bytes, sha256_file
from release import references
from release.checksums import read_sums
from release.facts.published_tables import TEXT_BATCH
from release.layout import KEPT_TABLE, SUMS
from release.tracing.answers import Match, TextMatches
from release.tracing.documents import find_uses
from release.tracing.release_data import Progress, ReleaseData
from stages.formats.table import stream_rows

INDEX = 1
"""Version of the index of texts."""
FTS5 = "fts5(text, content='', detail=none, columnsize=0, tokenize='trigram case_sensitive 1')"
TEXTS = f"CREATE VIRTUAL TABLE texts USING {FTS5}"
"""Trigrams without their positions: a third of the text in size, and nearly as narrow."""
TERMS = 100
"""The maximum number of trigrams in a query; every candidate is compared with the whole span."""
ABOUT = ("id", "source", "license", "origin", "split", "content_hash")


def trace_text(folder: Path, span: str, cache: Path, progress: Progress = lambda text: None) -> TextMatches:
    """Finds every kept document that contains the span exactly, with the steps that read it.

    Steps are found by id: if an earlier run had another text under the same id, its steps read that text. A span of
    less than three characters is searched for in every text.

    Args:
        folder: A release or its data repository.
        span: The text to find.
        cache: The folder of the index, which is made if it is missing. The index is named by the checksums of the
            kept files in `SHA256SUMS`; `atom verify` tells whether the files here have these checksums.
        progress: Is told each step.

    Raises:
        AtomError: The span is empty, or the index is damaged.
    """
    data = ReleaseData.locate(folder)
    try:
        span.encode()
    except UnicodeEncodeError:
        raise AtomError("the span is not valid Unicode text; give it in UTF-8") from None
    if not span:
        raise AtomError("the span is empty; give at least one character of the text")
    files, _ = _kept_files(data)
    index = build_index(folder, cache, progress) if len(span) >= 3 else None
    # None stands for all rows: without an index every text is compared.
    scanned: Iterable[tuple[str, Sequence[int] | None]] = dict.fromkeys(files).items()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, candidates in scanned if index is None else _candidates(index, span):
        for row in _matching_rows(files[name], span, candidates):
            about = {column: row[column] for column in ABOUT} | {"count": row["text"].count(span), "tables": []}
            rows.setdefault((row["id"], row["content_hash"]), about)["tables"].append(name)
    uses = find_uses(data, {id for id, _ in rows})
    matches = [Match(**row, uses=uses.get(id, [])) for (id, _), row in rows.items()]
    unknown = [f"the texts of {name}: they are by reference" for name in references.read(data.data)]
    return TextMatches(span, "index" if index else "scan", matches, [*data.unknown(), *unknown])


def build_index(folder: Path, cache: Path, progress: Progress = lambda text: None) -> Path | None:
    """Returns the index of the kept texts of a release, and makes it if it is not in the cache.

    It has the trigrams of every text by running number of row. None if this Python's SQLite cannot make one. Raises
    AtomError if a kept file differs from its checksum, or if the cache cannot be written.
    """
    if not _has_trigrams():
        return None
    files, sums = _kept_files(ReleaseData.locate(folder))
    index = cache / f"texts-{sha256_bytes(canonical([INDEX, dict(sums)]))}.sqlite"
    if index.exists():
        return index
    # Each process writes a file of its own, and only a complete one gets the name of the index.
    draft = index.with_name(f".{index.name}.{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        for name, path in files.items():  # else a damaged copy would be indexed under the checksums of an intact one
            if sha256_file(path) != sums[name]:
                raise AtomError(f"{path} differs from the checksums beside it; verify this copy")
        try:
            _write_index(draft, files, progress)
            os.rename(draft, index)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise AtomError(
            f"the index of texts cannot be written in {cache} ({error}); set ATOM_HOME to another folder"
        ) from None
    return index


def _kept_files(data: ReleaseData) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns {table: its file} and {table: SHA-256 in the checksum file} of the tables of kept text.

    Raises AtomError if one is missing or not listed.
    """
    checksums = read_sums(data.data / SUMS, str(data.data / SUMS))
    sums = {name: sum for name, sum in checksums.items() if KEPT_TABLE.fullmatch(name)}
    files = {data.name(path): path for path in data.kept()}
    if mismatched := sorted(files.keys() ^ sums.keys()):
        raise AtomError(
            f"{data.data / mismatched[0]} is missing or not listed in {SUMS} beside it; pull the data again"
        )
    return files, sums


def _has_trigrams() -> bool:
    """Returns True if this Python's SQLite has FTS5 with trigrams."""
    with closing(sqlite3.connect(":memory:")) as db:
        try:
            db.execute(TEXTS)
        except sqlite3.OperationalError:
            return False
    return True


def _write_index(target: Path, files: Mapping[str, Path], progress: Progress) -> None:
    row_number = 0
    with closing(sqlite3.connect(target)) as db:
        # An index that is not complete is thrown away, so it needs no journal.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("CREATE TABLE files (first INTEGER, name TEXT)")
        db.execute(TEXTS)
        for name, path in files.items():
            progress(f"indexing {name}")
            db.execute("INSERT INTO files VALUES (?, ?)", (row_number, name))
            for row in stream_rows(path, ["text"]):
                db.execute(
                    "INSERT INTO texts (rowid, text) VALUES (?, ?)", (row_number, _without_nul(row["text"] or ""))
                )
                row_number += 1
        db.commit()


def _without_nul(text: str) -> str:
    """Replaces NUL in a text or span, because FTS5 ends a text at NUL."""
    return text.replace("\0", "\ufffd")


def _candidates(index: Path, span: str) -> Iterator[tuple[str, Sequence[int]]]:
    """Yields (table, rows that have the trigrams of a span) of each table with such rows."""
    indexed_span = _without_nul(span)
    terms = sorted({indexed_span[i : i + 3] for i in range(len(indexed_span) - 2)})
    query = " AND ".join('"' + term.replace('"', '""') + '"' for term in terms[:: len(terms) // TERMS + 1])
    try:
        with closing(sqlite3.connect(f"{index.resolve().as_uri()}?mode=ro", uri=True)) as db:
            # A table without rows begins where the next one does; the one with rows comes last of them.
            starts = db.execute("SELECT first, name FROM files ORDER BY first, rowid").fetchall()
            rows = (
                row for (row,) in db.execute("SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rowid", (query,))
            )
            for place, of_table in groupby(rows, lambda row: bisect(starts, row, key=lambda start: start[0]) - 1):
                first_row, name = starts[place]
                yield name, array("q", (row - first_row for row in of_table))
    except sqlite3.Error as error:
        raise AtomError(f"the index {index} is damaged ({error}); remove it and run the command again") from None


def _matching_rows(path: Path, span: str, rows: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table whose text contains the span.

    `rows` are the numbers of the rows to compare, None for all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            first_row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if rows is None or bisect_left(rows, first_row) < bisect_left(rows, first_row + size):
                    for batch in file.iter_batches(TEXT_BATCH, row_groups=[group], columns=[*ABOUT, "text"]):
                        if rows is not None:
                            batch_rows = rows[bisect_left(rows, first_row) : bisect_left(rows, first_row + len(batch))]
                            positions, first_row = [n - first_row for n in batch_rows], first_row + len(batch)
                            batch = batch.take(pa.array(positions, pa.int64()))
                        matching = [n for n, text in enumerate(batch["text"].to_pylist()) if text and span in text]
                        yield from batch.take(pa.array(matching, pa.int64())).to_pylist()
                else:
                    first_row += size
    except (pa.ArrowException, OSError) as error:
        raise AtomError(f"{path} cannot be read as Parquet ({error}); pull it again") from None
