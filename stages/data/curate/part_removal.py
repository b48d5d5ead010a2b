"""The last step of curation on one part: duplicates are removed, and every document gets its final disposition.

The ids and shingles of the documents that removed ones duplicate, their representatives, are copied where every part
can look them up.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_slice
from stages.data.curate.deny_list import OPT_OUT_RULE
from stages.data.curate.duplicate_groups import Removed, mapped, write_array
from stages.data.curate.minhash import Ints, UInts, jaccard, shingle_sets
from stages.data.curate.settings import REPRESENTATIVE_BLOCKS, MinHash, SourcePart, no_counts, work_of
from stages.formats.table import (
    DISPOSITIONS,
    DOCUMENTS,
    GENERATED_DISPOSITIONS,
    KEPT,
    arrow_schema,
    column_names,
    content_hash,
    row_count,
    split_of,
    stream_batches,
    table_writer,
)

# For each document that filtering kept, in order, the columns of DISPOSITIONS that deduplication decides.
Decisions = dict[str, list[Any]]
_AGAIN = "run filter again"
# The columns that state the rule of a removal.
_RULE = ("rule", "value", "threshold", "duplicate_of")


def blocks_of(parts: Sequence[SourcePart]) -> list[Sequence[SourcePart]]:
    """Runs of consecutive parts: their representatives are in one file."""
    blocks = min(REPRESENTATIVE_BLOCKS, len(parts))
    return [parts[part_slice(len(parts), block, blocks)] for block in range(blocks)]


def block_folder(folder: Path, number: int) -> Path:
    """Returns the files of a block in the folder of an artifact or a part."""
    return folder / "representatives" / f"block-{number:05d}"


def write_representatives(
    folder: Path, kept: Path, parts: Sequence[SourcePart], exact: Removed, near: Removed, n_grams: int
) -> int:
    """Writes the representatives of a block as the files `records` and `index`, and returns their number.

    A record is an id and, if the representative has near duplicates, its shingles. The index has the addresses, then
    the ends of the records, then the bytes of the ids.

    Args:
        folder: The folder of the block, which is made.
        kept: The folder of the filtered documents of each part.
        parts: The parts of the block.
        exact: The exact duplicates.
        near: The near duplicates.
        n_grams: The number of words in a shingle.
    """
    addresses, ends, id_bytes = array("q"), array("q"), array("q")
    folder.mkdir(parents=True)
    with open(folder / "records", "wb") as file:
        for part in parts:
            near_rows = near.firsts_of(part)
            rows = np.union1d(exact.firsts_of(part), near_rows)
            start = 0
            # Texts are read only where shingles are needed.
            columns = ["id", "text"] if len(near_rows) else ["id"]
            for batch in stream_batches(part.file(kept), columns) if len(rows) else ():
                chosen, signed = (_within(numbers, start, len(batch)) for numbers in (rows, near_rows))
                texts = batch.column("text").take(signed).to_pylist() if len(signed) else []
                sets = dict(zip(signed.to_pylist(), shingle_sets(texts, n_grams), strict=True))
                for row, id in zip(chosen.to_pylist(), batch.column("id").take(chosen).to_pylist(), strict=True):
                    name = id.encode()
                    file.write(name)
                    if row in sets:
                        file.write(sets[row].tobytes())
                    addresses.append(part.first + start + row)
                    ends.append(file.tell())
                    id_bytes.append(len(name))
                start += len(batch)
    pieces = (np.frombuffer(column, np.int64) for column in (addresses, ends, id_bytes))
    return write_array(folder / "index", pieces) // 3


def _within(rows: Ints, start: int, count: int) -> Any:
    """Returns the sorted rows that lie in a batch of `count` rows from `start`, by their place in it."""
    first, stop = np.searchsorted(rows, [start, start + count])
    return pa.array(rows[first:stop] - start)


class Representatives:
    """The representatives of all blocks, by address: a context, in which the files that were read stay open."""

    def __init__(self, folder: Path, parts: Sequence[SourcePart]) -> None:
        """Opens no file yet; `folder` is the artifact of stage `representatives`."""
        self.folder, self.starts = folder, [block[0].first for block in blocks_of(parts)]
        self.blocks: dict[int, _Block] = {}

    def __enter__(self) -> Representatives:
        return self

    def __exit__(self, *error: object) -> None:
        for block in self.blocks.values():
            block.records.close()

    def read(self, address: int) -> tuple[str, UInts]:
        """Returns the id and the shingles of a representative.

        There are no shingles if all its duplicates are exact.
        """
        number = bisect_right(self.starts, address) - 1
        # Removed documents of a part duplicate few blocks; their files stay open.
        if number not in self.blocks:
            self.blocks[number] = _Block(block_folder(self.folder, number))
        return self.blocks[number].read(address)


class _Block:
    def __init__(self, folder: Path) -> None:
        self.addresses, self.ends, self.id_bytes = mapped(folder / "index").reshape(3, -1)
        self.records = open(folder / "records", "rb", buffering=0)  # noqa: SIM115  closed by Representatives

    def read(self, address: int) -> tuple[str, UInts]:
        row = int(np.searchsorted(self.addresses, address))
        start = int(self.ends[row - 1]) if row else 0
        record = os.pread(self.records.fileno(), int(self.ends[row]) - start, start)
        size = int(self.id_bytes[row])
        return record[:size].decode(), np.frombuffer(record, np.uint64, offset=size)


class PartRemoval:
    """Removes the duplicates of one part."""

    def __init__(
        self,
        filtered: Path,
        part: SourcePart,
        heldout_fraction: float,
        work: str,
        exact: Removed,
        near: Removed,
        representatives: Representatives,
        minhash: MinHash | None,
        opted_out: Mapping[int, tuple[str, str, float, float]],
    ) -> None:
        """Looks up the removals of the part; no document is read yet.

        Args:
            filtered: The folder of the artifact of stage `filter`.
            part: The part.
            heldout_fraction: Share of the documents of its source that are held out.
            work: The pattern of the works that are held out as a whole; empty: each document by itself.
            exact: The exact duplicates.
            near: The near duplicates.
            representatives: The documents that they duplicate.
            minhash: The settings of the search for near duplicates; None without one.
            opted_out: By row, the documents that are removed on request, which goes before the other rules.
        """
        self.opted_out = opted_out
        self.part, self.heldout_fraction, self.minhash = part, heldout_fraction, minhash
        self.work = re.compile(work) if work else None
        self.heldout_works = Counter[str]()
        self.representatives = representatives
        self.kept, self.dispositions, self.hashes = (
            part.file(filtered / folder) for folder in ("kept", "dispositions", "hashes")
        )
        self.exact = exact.of(part)
        self.near = near.of(part)

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes the part's kept documents and dispositions below `folder`, and returns the counts for the summary.

        These are documents_in, bytes_in, kept by split, removed by rule, removed_bytes, and `written` documents.
        """
        documents, start, counts = _Rows(self.kept), 0, no_counts()
        is_generated = "generator" in column_names(self.dispositions)
        columns = GENERATED_DISPOSITIONS if is_generated else DISPOSITIONS
        with (
            table_writer(self.part.file(folder / "kept"), KEPT) as write_kept,
            table_writer(self.part.file(folder / "dispositions"), columns) as write_dispositions,
        ):
            for batch in stream_batches(self.dispositions, list(columns)):
                table = pa.Table.from_batches([batch])
                passed = pc.equal(table["disposition"], "kept").combine_chunks()
                rows = documents.take(passed.true_count)
                if rows is None or not rows["id"].equals(table["id"].filter(passed)):
                    raise AtomError(f"{self.kept} does not hold the documents that {self.dispositions} keeps; {_AGAIN}")
                decisions = self._decide(rows, start)
                kept = pc.is_valid(pa.array(decisions["split"], pa.string()))
                split = pa.array(decisions["split"], pa.string())
                write_kept(rows.append_column("split", split).filter(kept))
                for name, values in decisions.items():
                    column = table[name].combine_chunks()
                    decided = pc.replace_with_mask(column, passed, pa.array(values, column.type))
                    table = table.set_column(table.schema.get_field_index(name), name, decided)
                write_dispositions(table)
                _count(counts, table, kept.true_count)
                start += len(rows)
        # Rows are matched by their numbers alone; tables of different lengths would shift them silently.
        counts["works"] = self.heldout_works
        if documents.take(1) is not None or row_count(self.hashes) != start:
            raise AtomError(f"{self.hashes} and {self.kept} do not hold {start} rows each; {_AGAIN}")
        return counts

    def _decide(self, rows: pa.Table, start: int) -> Decisions:
        """Returns the decisions about rows of the part, of which the first has the number `start`."""
        count = len(rows)
        decisions: Decisions = {name: [None] * count for name in (*_RULE, "match")}
        for row, first in _slice(self.exact, start, count):
            self._remove(decisions, row, "exact_duplicate", 1.0, 1.0, self.representatives.read(first)[0])
        if self.minhash is not None and (near := _slice(self.near, start, count)):
            texts = rows["text"].take(pa.array([row for row, _ in near])).to_pylist()
            for (row, first), shingles in zip(near, shingle_sets(texts, self.minhash.n_grams), strict=True):
                id, other = self.representatives.read(first)
                self._remove(decisions, row, "near_duplicate", jaccard(shingles, other), self.minhash.threshold, id)
        # Last, because a request overrides the other rules.
        for row in range(count) if self.opted_out else ():
            if opt_out := self.opted_out.get(start + row):
                duplicate_of, match, value, threshold = opt_out
                self._remove(decisions, row, OPT_OUT_RULE, value, threshold, duplicate_of)
                decisions["match"][row] = match
        kept = [rule is None for rule in decisions["rule"]]
        hashes = rows["content_hash"].to_pylist()
        splits = self._splits(rows, hashes, kept)
        return decisions | {
            "disposition": ["kept" if keep else "removed" for keep in kept],
            "split": splits,
            "kept_hash": [hash if keep else None for hash, keep in zip(hashes, kept, strict=True)],
        }

    def _splits(self, rows: pa.Table, hashes: Sequence[str], kept: Sequence[bool]) -> list[str | None]:
        """Returns the split of each kept document, by the hash of its work, or of its text if it names none."""
        splits: list[str | None] = [None] * len(rows)
        for row, (id, origin) in enumerate(zip(rows["id"].to_pylist(), rows["origin"].to_pylist(), strict=True)):
            if not kept[row]:
                continue
            work = work_of(self.work, id, origin) if self.work else None
            # Equal works of all sources fall on one side.
            split = split_of(content_hash(f"work {work}") if work else hashes[row], self.heldout_fraction)
            if work and split == "heldout":
                self.heldout_works[work] += 1
            splits[row] = split
        return splits

    @staticmethod
    def _remove(decisions: Decisions, row: int, *values: Any) -> None:
        for name, value in zip(_RULE, values, strict=True):
            decisions[name][row] = value


def _count(counts: dict[str, Any], table: pa.Table, written: int) -> None:
    """Adds the dispositions of some documents to the counts of a part."""
    removed = table.filter(pc.equal(table["disposition"], "removed"))
    kept = table.filter(pc.equal(table["disposition"], "kept"))
    counts["documents_in"] += len(table)
    counts["written"] += written
    counts["bytes_in"] += pc.sum(table["bytes"]).as_py() or 0
    counts["removed_bytes"] += pc.sum(removed["bytes"]).as_py() or 0
    for name, column in (("kept", kept["split"]), ("removed", removed["rule"])):
        counts[name].update({row["values"]: row["counts"] for row in column.value_counts().to_pylist()})


class _Rows:
    """The rows of a file of documents in order, some at a time."""

    def __init__(self, path: Path) -> None:
        self.batches: Iterator[pa.RecordBatch] = stream_batches(path, list(DOCUMENTS))
        self.rest = arrow_schema(DOCUMENTS).empty_table()

    def take(self, count: int) -> pa.Table | None:
        """Returns the next `count` rows; None if there are fewer."""
        while len(self.rest) < count:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.rest = pa.concat_tables([self.rest, pa.Table.from_batches([batch])])
        rows, self.rest = self.rest.slice(0, count), self.rest.slice(count)
        return rows


def _slice(removed: tuple[NDArray[np.int64], NDArray[np.int64]], start: int, count: int) -> list[tuple[int, int]]:
    """Returns the removed rows among `count` rows from `start`, by their place among them, and what each duplicates."""
    rows, firsts = removed
    low, high = np.searchsorted(rows, [start, start + count])
    return list(zip((rows[low:high] - start).tolist(), firsts[low:high].tolist(), strict=True))
