"""A sample of the texts of a corpus, by content hash: the same for any order of the documents, in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.formats.table import content_hash, part_files, read_errors, sources_of, stream_batches

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SPARE = 4  # files of a source are chosen until they have this many times the bytes of the sample
ROWS = 256  # documents in memory at a time
PENDING = 1_000_000  # documents that are collected before those with larger hashes are dropped


def choose_files(kept: Path, leave_out: Collection[str], size: int) -> dict[str, list[Path]]:
    """Returns the files of kept documents of each source from which a sample of `size` bytes is drawn.

    These are all files, or as many of them, in the order of a hash of their number, as have SPARE times these bytes.
    Reads their footers only. Sources in `leave_out` are not in the result.
    """
    import pyarrow.parquet as pq

    chosen = {}
    for name in sources_of(kept):
        if name in leave_out:
            continue
        files = part_files(kept, name)
        by_hash = sorted(range(len(files)), key=lambda number: content_hash(f"tokenizer/{name}/{number}"))

        numbers: list[int] = []
        available = 0
        for number in by_hash:
            if available >= SPARE * size:
                break
            numbers.append(number)
            with read_errors(files[number]):
                available += _text_bytes(pq.read_metadata(files[number]))
        chosen[name] = [files[number] for number in sorted(numbers)]
    return chosen


def _text_bytes(footer: Any) -> int:
    """Returns the uncompressed bytes of the texts of a file, by its footer."""
    column = footer.schema.names.index("text")
    return sum(footer.row_group(n).column(column).total_uncompressed_size for n in range(footer.num_row_groups))


@dataclass(frozen=True)
class Sample:
    """The documents of a split of a source with the least content hashes, an order that mixes the parts of a source.

    Attributes:
        files: The files of the source.
        split: Name of the split; None for documents before the split.
        hashes: The first 64 bits of the content hashes, ascending [documents].
        lengths: Bytes of the texts [documents].
    """

    files: Sequence[Path]
    split: str | None
    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int64]

    @classmethod
    def draw(cls, files: Sequence[Path], split: str | None, documents: int, size: int = 0) -> Sample:
        """Returns the sample of at least so many documents and `size` bytes, or of all documents if there are fewer."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        hashes, lengths = np.empty(0, np.uint64), np.empty(0, np.int64)
        pending: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []

        def merge() -> None:
            nonlocal hashes, lengths
            hashes = np.concatenate([hashes, *(more_hashes for more_hashes, _ in pending)])
            lengths = np.concatenate([lengths, *(more_lengths for _, more_lengths in pending)])
            pending.clear()
            # The sample is the documents of smallest hash, so it does not depend on the order of the files.
            order = np.argsort(hashes, kind="stable")
            hashes, lengths = hashes[order], lengths[order]
            count = max(documents, int(np.searchsorted(np.cumsum(lengths), size)) + 1)
            hashes, lengths = hashes[:count], lengths[:count]

        for path in files:
            for rows in _rows_of(path, split):
                row_lengths = pc.binary_length(rows["text"].cast(pa.binary())).to_numpy(zero_copy_only=False)
                pending.append((_hashes(rows), row_lengths))
                # Merged seldom: sorting costs more than keeping some batches.
                if len(pending) * ROWS > len(hashes) + PENDING:
                    merge()
        merge()
        return cls(files, split, hashes, lengths)

    def texts(self, count: int) -> Iterator[list[str]]:
        """Yields the texts of the first `count` documents, in the order of the files and a few at a time."""
        import pyarrow as pa

        if not count:
            return
        for path in self.files:
            for rows in _rows_of(path, self.split):
                yield rows.filter(pa.array(_hashes(rows) <= self.hashes[count - 1]))["text"].to_pylist()


def _rows_of(path: Path, split: str | None) -> Iterator[pa.RecordBatch]:
    """Yields the texts and hashes of the documents of a split, some at a time."""
    import pyarrow.compute as pc

    columns = ["text", "content_hash"]
    for batch in stream_batches(path, columns if split is None else [*columns, "split"], ROWS):
        yield batch if split is None else batch.filter(pc.equal(batch["split"], split))


def _hashes(rows: pa.RecordBatch) -> NDArray[np.uint64]:
    """Returns the first 64 bits of the content hash of each document."""
    import numpy as np

    return np.array([int(hash[:16], 16) for hash in rows["content_hash"].to_pylist()], np.uint64)


def interleave(lengths: Mapping[str, Sequence[int] | NDArray[np.int64]], limit: int) -> dict[str, int]:
    """Returns the number of documents to take of each source, so that all sources have equal bytes.

    Documents are taken in their order, until they have `limit` bytes in total. A source that is exhausted gives no
    more; the others go on. `lengths` are the bytes of each document, by source.
    """
    counts = dict.fromkeys(sorted(lengths), 0)
    # The bytes that are taken of each source that is not exhausted.
    taken_bytes = dict.fromkeys(sorted(lengths), 0)
    total = 0
    while taken_bytes and total < limit:
        name = min(taken_bytes, key=lambda source: (taken_bytes[source], source))
        if counts[name] == len(lengths[name]):
            del taken_bytes[name]
            continue

        length = int(lengths[name][counts[name]])
        counts[name] += 1
        taken_bytes[name] += length
        total += length
    return counts
