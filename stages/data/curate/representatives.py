"""The documents that removed ones duplicate: their ids and shingles, copied where every part can look them up."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.parts import part_slice
from stages.data.curate.duplicate_groups import Part, Removed, mapped, write_array
from stages.data.curate.minhash import Ints, UInts, shingle_sets
from stages.data.curate.settings import REPRESENTATIVE_BLOCKS
from stages.formats.table import stream_batches


def blocks_of(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Runs of consecutive parts: their representatives are in one file."""
    blocks = min(REPRESENTATIVE_BLOCKS, len(parts))
    return [parts[part_slice(len(parts), block, blocks)] for block in range(blocks)]


def block_folder(folder: Path, number: int) -> Path:
    """Returns the files of a block in the folder of an artifact or a part."""
    return folder / "representatives" / f"block-{number:05d}"


def write_representatives(
    folder: Path, kept: Path, parts: Sequence[Part], exact: Removed, near: Removed, n_grams: int
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

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
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
