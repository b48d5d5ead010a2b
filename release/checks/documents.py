"""Checks the tables of documents: dispositions, licenses, texts, conversations and Merkle roots.

Every document has one disposition, a license, and the same text in every table.

Tables are streamed in bounded memory and compared row by row: the kept documents of a part stand in the order of their
dispositions, and those of each split in the order of their tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from release import layout, merkle, references
from release.checks.check import Findings, require_file
from release.facts import message_tables
from release.facts.published_tables import TEXT_BATCH, read_json, stream_batches
from release.layout import ROOTS
from release.opened_release import Release
from stages.formats.table import SPLITS

BATCH = 16_384
"""Rows that are read together."""
CANDIDATES = 100_000
"""The maximum number of hashes that are compared by their ids."""


class Rows:
    """The rows of a table in their order, of which `take` reads the next ones.

    Attributes:
        path: The file; a missing one has no rows.
        columns: The columns to read.
        aligned: Whether the rows so far were the expected ones.
        stray: The id of the first row that was not.
    """

    def __init__(self, path: Path, columns: list[str], where: Mapping[str, str] | None = None) -> None:
        self.path, self.columns, self.aligned = path, columns, True
        self.stray: str | None = None
        self._batches = _batches_where(path, columns, where or {}) if path.exists() else iter(())
        self._rest: Any = None

    def take(self, count: int) -> Any:
        """Returns the next rows, as a batch; fewer than `count` at the end."""
        import pyarrow as pa

        taken: list[Any] = []
        while count > 0:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._batches, None)
                if self._rest is None:
                    break
            rows = self._rest.slice(0, count)
            self._rest = self._rest.slice(len(rows))
            count -= len(rows)
            taken.append(rows)
        # of arrays: some functions of Arrow crash on a column of no chunks
        columns = [
            pa.concat_arrays([rows.column(name) for rows in taken] or [pa.array([], pa.string())])
            for name in self.columns
        ]
        return pa.RecordBatch.from_arrays(columns, names=self.columns)

    def next(self) -> dict[str, Any] | None:
        """Returns the next row; None at the end."""
        rows = self.take(1).to_pylist()
        return rows[0] if rows else None


def _batches_where(path: Path, columns: list[str], where: Mapping[str, str]) -> Iterator[Any]:
    """Streams the rows that have the given values in some columns.

    It is not a method: the generator would refer to the object that holds it, and both would stay in memory.
    """
    for batch in text_batches(path, [*columns, *where], BATCH):
        for name, value in where.items():
            batch = batch.filter(equals(batch.column(name), value))
        yield batch.select(columns)


def text_batches(files: Path | list[Path], columns: list[str], size: int = BATCH) -> Iterator[Any]:
    """Streams columns of text, which are of the type string even if they hold nothing but nulls."""
    import pyarrow as pa

    for batch in stream_batches(files, columns, size):
        texts = [column.cast(pa.string()) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(texts, names=columns)


def equals(column: Any, value: str) -> Any:
    """Returns a mask of the rows where a column has a value; false for null."""
    import pyarrow.compute as pc

    return pc.fill_null(pc.equal(column, value), False)


def repeated_ids(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yields (file, id) of every row whose id occurred in an earlier row."""
    import numpy as np
    import pyarrow.parquet as pq

    # Eight bytes in memory for each document.
    hashes, count = np.empty(sum(pq.read_metadata(path).num_rows for path in files), np.int64), 0
    for _, _, values in _id_hashes(files):
        hashes[count : count + len(values)] = values
        count += len(values)
    hashes.sort()
    repeated = hashes[1:][hashes[1:] == hashes[:-1]]
    wanted = np.unique(repeated[:CANDIDATES])
    if not len(wanted):
        return
    # Equal hashes are only candidates: the ids themselves decide.
    seen: set[str] = set()
    for path, ids, values in _id_hashes(files):
        for position in np.flatnonzero(np.isin(values, wanted)).tolist():
            if (id := ids[position]) in seen:
                yield path, id
            seen.add(id)


def _id_hashes(files: list[Path]) -> Iterator[tuple[Path, list[str], Any]]:
    """Yields (file, ids, their hashes in this process) by batch.

    Python's hash of a string is keyed, so no file can be made whose ids collide.
    """
    import numpy as np

    for path in files:
        for batch in text_batches(path, ["id"]):
            ids = batch.column("id").to_pylist()
            yield path, ids, np.fromiter(map(hash, ids), np.int64, len(ids))


UNKNOWN_LICENSES = frozenset({"", "unknown", "noassertion", "none", "other"})
MOST_NAMED = 12
"""The maximum number of licenses that a summary names."""
MOST_PROBLEMS = 10_000
"""The maximum number of problems that a check collects."""
MOST_MESSAGES = 20
"""The maximum number of problems of messages that are named."""


def licenses(release: Release) -> Findings:
    """Checks that every document has a license, including removed ones."""
    expressions: set[str] = set()
    problems = list(islice(_unlicensed(release.dataset, expressions), MOST_PROBLEMS))
    names = sorted(expressions)
    rest = f" and {len(names) - MOST_NAMED} further expressions" if len(names) > MOST_NAMED else ""
    summary = f"every document has a license: {', '.join(names[:MOST_NAMED])}{rest}"
    return Findings(problems, compared=bool(expressions), summary=summary)


def _unlicensed(dataset: Path, expressions: set[str]) -> Iterator[str]:
    """Yields sentences about documents without a license. Adds the licenses to `expressions`."""
    import pyarrow.compute as pc

    for path in layout.all_files(layout.disposition_files(dataset)):
        for batch in text_batches(path, ["id", "source", "license"]):
            stated = batch.column("license").unique().to_pylist()
            expressions.update(license or "" for license in stated)
            if not any((license or "").lower() in UNKNOWN_LICENSES for license in stated):
                continue
            license = pc.utf8_lower(pc.fill_null(batch.column("license"), ""))
            for row in batch.filter(pc.is_in(license, value_set=_strings(UNKNOWN_LICENSES))).to_pylist():
                yield f"{_name(dataset, path)}: document {row['id']} of source {row['source']} has no license"


def dispositions(release: Release) -> Findings:
    """Checks that each document has one disposition, and that in = kept + removed.

    The kept ones must be exactly those of the tables of kept documents.
    """
    counts: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    problems = list(islice(_unbalanced(release.dataset, counts, kept), MOST_PROBLEMS))
    total, kept_total = counts.total(), kept.total()
    summary = f"{total} documents in = {kept_total} kept + {total - kept_total} removed"
    return Findings(problems, compared=total > 0, summary=summary)


def _unbalanced(dataset: Path, counts: Counter[str], kept: Counter[str]) -> Iterator[str]:
    """Yields the problems of dispositions. Counts the documents of each source, and the kept ones."""
    files = layout.all_files(layout.disposition_files(dataset))
    for path, id in repeated_ids(files):
        yield f"{_name(dataset, path)}: document {id} has two fates"
    if not files:
        yield f"{layout.DISPOSITIONS} has no table"
    yield from layout.problems(dataset)
    for part in layout.document_parts(dataset):
        yield from _unbalanced_part(dataset, part, counts, kept)
    known = counts.keys() | read_json(dataset / "summary.json")["sources"].keys()
    for path in sorted((dataset / "sources").glob("*.json")):
        if path.stem not in known:
            yield f"sources/{path.name} is about no source of the documents"
    for source in sorted(counts):
        declared = dataset / "sources" / f"{source}.json"
        if declared.exists() and read_json(declared).get("documents", counts[source]) != counts[source]:
            yield f"dispositions: {counts[source]} documents of {source}, the source says another number"


def _unbalanced_part(dataset: Path, part: layout.Part, counts: Counter[str], kept: Counter[str]) -> Iterator[str]:
    import pyarrow.compute as pc

    name = _name(dataset, part.dispositions)
    if not part.dispositions.exists():
        yield f"{name} is missing"
        return
    columns = ["id", "split", "license"]
    table = Rows(part.kept, columns)
    for batch in text_batches(part.dispositions, [*columns, "source", "disposition", "rule"]):
        is_kept, is_removed = (equals(batch.column("disposition"), value) for value in ("kept", "removed"))
        has_rule = pc.not_equal(pc.fill_null(batch.column("rule"), ""), "")
        decided = pc.or_(pc.and_(is_kept, pc.invert(has_rule)), pc.and_(is_removed, has_rule))
        for id in batch.column("id").filter(pc.invert(decided)).to_pylist():
            yield f"{name}: document {id} is neither kept nor removed by a rule"
        for source, count in _counts(batch.column("source")):
            counts[source] += count
            if source != part.source:
                yield f"{name}: {count} documents of {source} stand among those of {part.source}"
        kept_batch = batch.filter(is_kept)
        kept.update(dict(_counts(kept_batch.column("source"))))
        yield from _misplaced(dataset, part, table, kept_batch.select(columns))
    if table.aligned and (row := table.next()) is not None:
        yield _not_in_both(dataset, table.path, row["id"])


def _misplaced(dataset: Path, part: layout.Part, table: Rows, expected: Any) -> Iterator[str]:
    """Says how the next kept documents of a part differ from those that dispositions expect.

    Says nothing after the first that stands elsewhere, since the later ones then do too.
    """
    # After the first misplaced row every later one would differ as well.
    if not table.aligned:
        return
    actual = table.take(len(expected))
    name = _name(dataset, table.path)
    row = _first_difference(expected.column("id"), actual.column("id"))
    if row is not None:
        table.aligned = False
        id = expected.column("id")[row].as_py()
        # A missing document and one in another place look alike here; a search tells which it is.
        if not _has(table.path, id) or row == len(actual):
            yield _not_in_both(dataset, table.path, id)
            return
        other = actual.column("id")[row].as_py()
        if not _has(part.dispositions, other, only_kept=True):
            yield _not_in_both(dataset, table.path, other)
        else:
            yield f"{name}: document {other} is not in the order of the dispositions"
        return
    for row in _differences(expected, actual, ["split", "license"]):
        id = expected.column("id")[row].as_py()
        yield f"{name}: document {id} has another split or license than its disposition"


def _not_in_both(dataset: Path, kept: Path, id: str) -> str:
    return f"{_name(dataset, kept)}: document {id} is not kept in both tables"


def _has(path: Path, id: str, only_kept: bool = False) -> bool:
    """Returns True if a table has a document.

    With `only_kept`, it must be among the kept documents of a table of dispositions.
    """
    import pyarrow.compute as pc

    columns = ["id", "disposition"] if only_kept else ["id"]
    for batch in text_batches(path, columns) if path.exists() else ():
        mask = equals(batch.column("id"), id)
        if only_kept:
            mask = pc.and_(mask, equals(batch.column("disposition"), "kept"))
        if pc.any(mask).as_py():
            return True
    return False


def content_hashes(release: Release) -> Findings:
    """Checks that the content hash of every kept document is equal in every table.

    It must be that of the document's text, if the text is published.
    """
    dataset = release.dataset
    by_reference = references.read(dataset).keys()
    parts = list(layout.document_parts(dataset))
    problems = (text for part in parts for text in _unequal_hashes(dataset, part, by_reference))
    return Findings(list(islice(problems, MOST_PROBLEMS)), compared=bool(parts))


def _unequal_hashes(dataset: Path, part: layout.Part, by_reference: Collection[str]) -> Iterator[str]:
    if missing := [path for path in (part.dispositions, part.tokens) if not path.exists()]:
        yield f"{_name(dataset, missing[0])} is missing"
        return
    dispositions_name, tokens_name = _name(dataset, part.dispositions), _name(dataset, part.tokens)
    name, of_source = _name(dataset, part.kept), {"source": part.source}
    stated = Rows(part.dispositions, ["id", "kept_hash"], of_source | {"disposition": "kept"})
    tokens = {split: Rows(part.tokens, ["id", "content_hash"], of_source | {"split": split}) for split in SPLITS}
    columns = ["id", "split", "text", "content_hash"]
    for batch in text_batches(part.kept, columns, TEXT_BATCH) if part.kept.exists() else ():
        for row in batch.to_pylist():
            if row["text"] is None:
                if part.source not in by_reference:
                    yield f"{name}: {row['id']} has no text, and is not by reference"
            elif hashlib.sha256(row["text"].encode()).hexdigest() != row["content_hash"]:
                yield f"{name}: the text of {row['id']} is not what its content hash says"
            if row["split"] not in SPLITS:
                yield f"{name}: the split of {row['id']} is neither {' nor '.join(SPLITS)}"
        for id in _other_hashes(batch, stated):
            yield f"{dispositions_name}: the kept hash of {id} is not that of {name}"
        for split, rows in tokens.items():
            for id in _other_hashes(batch.filter(equals(batch.column("split"), split)), rows):
                yield f"{tokens_name}: the content hash of {id} is not that of {name}"
    for rows in tokens.values():
        # Rows that are left over are of documents that the table of kept ones does not have.
        stray = rows.stray if not rows.aligned else (rows.next() or {}).get("id")
        if stray is not None:
            yield f"{tokens_name}: {stray} is no kept document"
    # The rows above are those of known splits; others would not be seen at all.
    yield from _stray_tokens(dataset, part)
    yield from _hashes_of_removed(dataset, part)


def _stray_tokens(dataset: Path, part: layout.Part) -> Iterator[str]:
    """Yields a sentence for each row of tokens with an unknown source or split."""
    import pyarrow.compute as pc

    for batch in text_batches(part.tokens, ["id", "source", "split"]):
        known = pc.and_(
            equals(batch.column("source"), part.source),
            pc.is_in(batch.column("split"), value_set=_strings(SPLITS)),
        )
        for id in batch.column("id").filter(pc.invert(known)).to_pylist():
            yield f"{_name(dataset, part.tokens)}: {id} is no kept document"


def _hashes_of_removed(dataset: Path, part: layout.Part) -> Iterator[str]:
    import pyarrow.compute as pc

    for batch in text_batches(part.dispositions, ["id", "disposition", "kept_hash"]):
        has_hash = pc.not_equal(pc.fill_null(batch.column("kept_hash"), ""), "")
        removed = pc.invert(equals(batch.column("disposition"), "kept"))
        for id in batch.column("id").filter(pc.and_(has_hash, removed)).to_pylist():
            yield f"{_name(dataset, part.dispositions)}: {id} has a kept hash, but is not kept"


def _other_hashes(kept: Any, rows: Rows) -> Iterator[str]:
    """Yields the ids of kept documents whose hash in the next rows of another table differs, or that are not there.

    Nothing after the first that is not there.
    """
    if not rows.aligned:
        return
    other = rows.take(len(kept))
    row = _first_difference(kept.column("id"), other.column("id"))
    if row is not None:
        rows.aligned = False
        rows.stray = other.column("id")[row].as_py() if row < len(other) else None
        yield kept.column("id")[row].as_py()
        return
    # The tables have other names for this hash, such as `kept_hash`.
    for row in _differences(kept, other.rename_columns(["id", "content_hash"]), ["content_hash"]):
        yield kept.column("id")[row].as_py()


def _first_difference(expected: Any, actual: Any) -> int | None:
    """Returns the first place where two columns differ, or where the second one ends."""
    import pyarrow.compute as pc

    count = len(actual)
    equal = pc.equal(expected.slice(0, count), actual)
    row: int = pc.index(pc.fill_null(equal, False), False).as_py()
    if row >= 0:
        return row
    return count if count < len(expected) else None


def _differences(expected: Any, actual: Any, columns: list[str]) -> list[int]:
    """Returns the rows of two tables of the same length that differ in a column."""
    import pyarrow.compute as pc

    equal = None
    for column in columns:
        # Arrow has no answer for a comparison with null, and here two nulls are equal.
        left, right = (pc.fill_null(table.column(column), "\0") for table in (expected, actual))
        same = pc.equal(left, right)
        equal = same if equal is None else pc.and_(equal, same)
    rows: list[int] = pc.indices_nonzero(pc.invert(equal)).to_pylist()
    return rows


def _counts(column: Any) -> list[tuple[str, int]]:
    return [(row["values"], row["counts"]) for row in column.value_counts().to_pylist()]


def _strings(values: Iterable[str]) -> Any:
    import pyarrow as pa

    return pa.array(sorted(values))


def _name(dataset: Path, path: Path) -> str:
    return path.relative_to(dataset).as_posix()


def messages(release: Release) -> Findings:
    """Checks that the messages of every conversation are those of its text."""
    published = list(message_tables.published(release.dataset))
    problems = list(islice(message_tables.problems(release.dataset), MOST_MESSAGES))
    summary = f"the messages of every conversation are those of its text: {', '.join(published)}"
    return Findings(problems, compared=bool(published), summary=summary)


def merkle_roots(release: Release) -> Findings:
    """Checks that the published Merkle roots are those of the tables."""
    stated, computed = read_json(require_file(release.dataset, ROOTS)), merkle.roots(release.dataset)
    names = [name for name in sorted(stated.keys() | computed.keys()) if stated.get(name) != computed.get(name)]
    problems = [f"{ROOTS}: the root of {name} is not that of its table" for name in names]
    return Findings(problems, compared=bool(computed))
