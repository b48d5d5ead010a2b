"""The chunks of a source: an index from their numbers to places in documents, and the streams in which they are read.

A document longer than a row is cut into chunks, numbered through a source in the order of its parts and documents. One
with a prompt, such as a turn of a conversation, has its first chunk alone: later targets would have lost it. The
index is made from the table of documents alone, one file for each part of a source. Its batches of documents are mapped
one at a time, so that memory grows neither with the documents nor with the chunks.

A stream has the chunks of a source, or its long or its short ones, permuted again in each epoch. A position in it is
the number of chunks before it, through all epochs. Positions and chunks are functions of each other: a seeded Feistel
network over pairs of digits permutes a square of side ceil(sqrt(n)), and cycle-walking leaves out what lies beyond n
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Time and memory are the same for every n, so
any step can be looked up in both directions. The number of tokens before a position needs sums over the stream, which
are made once in sealed runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, seal_part
from stages.formats.table import read_errors

# Documents of a batch of the index.
BATCH = 1 << 16
# The pools of a source's chunks: all of them or, where long documents are up-weighted, the long and the short ones.
ALL, LONG, SHORT = "", "long", "short"
FILE = "chunks.arrow"
Digits = tuple[NDArray[np.uint64], NDArray[np.uint64]]
# The largest supported n.
MOST = 1 << 40
# Four rounds make a Feistel network pseudo-random (Luby and Rackoff, 1988); small squares need a few more.
ROUNDS = 6
# Indices that are computed together: their intermediate values stay in the processor's cache.
SLICE = 1 << 15
# Positions whose sums are sealed together.
RUN = 1 << 19
# Positions of one sum.
STRIDE = 1 << 14


@dataclass(frozen=True)
class Cut:
    """The rule by which documents are cut.

    Attributes:
        sequence_length: Targets of a row.
        over: A chunk of more targets is long; None: there is one pool of all chunks.
    """

    sequence_length: int
    over: int | None = None

    @property
    def pools(self) -> tuple[str, ...]:
        return (ALL,) if self.over is None else (LONG, SHORT)

    def ranges(self, tokens: NDArray[np.int64], loss_from: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Returns (first, first short, end) of the chunks of each document that carry loss, in closed form.

        Chunks without loss come first. Of the others, all but a document's last fill a row, so long ones come before
        short ones. With one pool every chunk is a short one.
        """
        row = self.sequence_length
        # A document of t tokens has t - 1 targets: ceil((t - 1) / row) chunks.
        end = np.maximum(tokens - 2 + row, 0) // row
        # What is beyond the first row has lost its prompt. A prompt that fills the row leaves no chunk with loss.
        end = np.where(loss_from > 0, np.minimum(end, 1), end)
        first = np.minimum(np.where(loss_from < tokens, np.maximum(loss_from - 1, 0) // row, end), end)
        if self.over is None or row <= self.over:
            return first, first, end
        # Only a document's last chunk can be shorter than a row.
        last_is_short = tokens - 1 - (end - 1) * row <= self.over
        return first, np.maximum(end - last_is_short, first), end

    def spans(
        self, pool: str, tokens: NDArray[np.int64], loss_from: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (first chunk, number of chunks) of each document in a pool."""
        first, short, end = self.ranges(tokens, loss_from)
        return (first, short - first) if pool == LONG else (short, end - short)

    def slots(self, pool: str, tokens: NDArray[np.int64], loss_from: NDArray[np.int64]) -> int:
        """Returns the number of targets of all chunks in a pool, with and without loss."""
        first, count = self.spans(pool, tokens, loss_from)
        row = self.sequence_length
        begin, end = first * row, (first + count) * row
        return int((end.clip(max=(tokens - 1).clip(min=0)) - begin)[count > 0].sum())


def seal_index(work: Path, file: Path, source: str, part: int, cut: Cut) -> Part:
    """Seals the index of one part of a source, made from its table of documents.

    Its facts are `batches`, for each batch the number of its documents and of the chunks of each pool, the `slots` of
    each pool, and the number of `cut` documents, whose prompt and answer are longer than a row.
    """
    fields: list[tuple[str, Any]] = [(f"start_{pool}", pa.uint32()) for pool in cut.pools]
    schema = pa.schema([*fields, ("tokens", pa.int32()), ("loss_from", pa.int32()), ("id", pa.large_string())])

    def make(folder: Path) -> dict[str, Any]:
        batches, slots, too_long = list[list[int]](), dict.fromkeys(cut.pools, 0), 0
        with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _documents(file, source):
                tokens, loss_from = (batch[name].to_numpy().astype(np.int64) for name in ("tokens", "loss_from"))
                too_long += int(((loss_from > 0) & (tokens - 1 > cut.sequence_length)).sum())
                counts = [cut.spans(pool, tokens, loss_from)[1] for pool in cut.pools]
                batches.append([len(batch), *(int(count.sum()) for count in counts)])
                for pool in cut.pools:
                    slots[pool] += cut.slots(pool, tokens, loss_from)
                # The number of chunks of each pool before each document.
                starts = [np.cumsum(count) - count for count in counts]
                arrays = [*starts, batch["tokens"], batch["loss_from"], batch["id"]]
                writer.write_batch(
                    pa.record_batch([pa.array(a).cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema)
                )
        return {"batches": batches, "slots": slots, "cut": too_long}

    return seal_part(work / "index" / source, f"{part:05d}", make)


def _documents(file: Path, source: str) -> Iterator[pa.RecordBatch]:
    """Yields `tokens`, `loss_from` and `id` of the training documents of a source, some at a time.

    Raises AtomError if the documents are not counted from 0.
    """
    names, ordinal = ["source", "split", "ordinal", "tokens", "loss_from", "id"], 0
    with read_errors(file), pq.ParquetFile(file) as parquet:
        for rows in parquet.iter_batches(BATCH, columns=names):
            batch = rows.filter((pc.field("source") == source) & (pc.field("split") == "train"))
            if not len(batch):
                continue
            # The index finds a document by its number, so a gap would shift all that follow.
            if not np.array_equal(batch["ordinal"].to_numpy(), np.arange(ordinal, ordinal + len(batch))):
                raise AtomError(f"{file} does not count the training documents of {source} from 0; rebuild it")
            ordinal += len(batch)
            yield batch


class ChunkIndex:
    """The chunks of a source, from the sealed index of each of its parts."""

    def __init__(self, parts: Sequence[tuple[int, Part]], cut: Cut) -> None:
        """Adds up the counts of the parts; `parts` are the (number, index) of each part, in order."""
        self.cut, self.files = cut, [part.folder / FILE for _, part in parts]
        self.numbers = np.array([number for number, _ in parts], np.int32)
        table = [
            (place, batch, *counts)
            for place, (_, part) in enumerate(parts)
            for batch, counts in enumerate(part.facts["batches"])
        ]
        columns = np.array(table, np.int64).reshape(-1, 3 + len(cut.pools)).T
        # The position in `files` and the number in its file of each batch.
        self.place, self.batch = columns[:2]
        # Training documents of the source before each batch, and of all.
        self.documents = _sums(columns[2])
        # Chunks before each batch, and all of them, by pool.
        self.starts = {pool: _sums(column) for pool, column in zip(cut.pools, columns[3:], strict=True)}
        # Targets of all chunks, by pool.
        self.slots = {pool: sum(part.facts["slots"][pool] for _, part in parts) for pool in cut.pools}
        # Documents of which all beyond the first row is left out.
        self.cut_documents: int = sum(part.facts["cut"] for _, part in parts)

    @property
    def chunks(self) -> int:
        """Chunks of all pools."""
        return sum(self.count(pool) for pool in self.cut.pools)

    def count(self, pool: str) -> int:
        return int(self.starts[pool][-1])

    def read(self, pool: str, chunks: NDArray[np.int64], ids: bool = True) -> dict[str, Any]:
        """Returns the columns part, ordinal, offset, length and loss_from of these chunks of a pool.

        With `ids` also the column `id`, an Arrow array.
        """
        by_number = np.argsort(chunks, kind="stable")
        names = ("part", "ordinal", "offset", "length", "loss_from")
        columns: dict[str, Any] = {name: np.empty(len(chunks), np.int32) for name in names}
        found_ids = [pa.array([], pa.large_string())]
        for batch, rows, numbers in _by_batch(self.starts[pool], chunks, by_number):
            table = self._load(batch)
            document = np.searchsorted(table[f"start_{pool}"].to_numpy(), numbers, "right") - 1
            tokens, loss_from = (table[name].to_numpy()[document].astype(np.int64) for name in ("tokens", "loss_from"))
            first, _ = self.cut.spans(pool, tokens, loss_from)
            offset = (first + numbers - table[f"start_{pool}"].to_numpy()[document]) * self.cut.sequence_length
            length = np.minimum(self.cut.sequence_length + 1, tokens - offset)
            columns["part"][rows] = self.numbers[self.place[batch]]
            columns["ordinal"][rows] = document + self._first_ordinal(batch)
            columns["offset"][rows], columns["length"][rows] = offset, length
            columns["loss_from"][rows] = np.clip(loss_from - offset - 1, 0, length - 1)
            if ids:
                found_ids.append(table["id"].take(pa.array(document)))
        if ids:
            place = np.empty(len(chunks), np.int64)
            place[by_number] = np.arange(len(chunks))
            columns["id"] = pa.concat_arrays(found_ids).take(pa.array(place)).cast(pa.string())
        return columns

    def chunks_of(self, part: int, ordinal: int) -> dict[str, range]:
        """Returns the chunks of a document, by pool. Raises AtomError if the source has no such training document."""
        place = np.flatnonzero(self.numbers == part)
        batches = np.flatnonzero(self.place == place[0]) if len(place) else place
        for batch in batches.tolist():
            document = ordinal - self._first_ordinal(batch)
            if 0 <= document < self.documents[batch + 1] - self.documents[batch]:
                table = self._load(batch)
                columns = {name: table[name].to_numpy() for name in ("tokens", "loss_from")}
                row = {name: values[document : document + 1].astype(np.int64) for name, values in columns.items()}
                ranges = {}
                for pool in self.cut.pools:
                    start = int(self.starts[pool][batch] + table[f"start_{pool}"][int(document)].as_py())
                    ranges[pool] = range(start, start + int(self.cut.spans(pool, **row)[1][0]))
                return ranges
        raise AtomError(f"part {part} has no training document {ordinal}; ordinals count from 0 in each part")

    def documents_at(self, parts: NDArray[np.int64], ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], pa.Array]:
        """Returns (tokens, id) of these training documents; -1 and null where there is none."""
        tokens, place = np.full(len(parts), -1), np.zeros(len(parts), np.int64)
        ids, count = [pa.array([], pa.large_string())], 0
        numbers = np.searchsorted(self.numbers, parts)
        first, end = (self.documents[np.searchsorted(self.place, numbers, side)] for side in ("left", "right"))
        documents = first + ordinals
        known = np.isin(parts, self.numbers) & (ordinals >= 0) & (documents < end)
        rows = np.flatnonzero(known)
        # In the order of the documents, so that each batch is mapped once.
        rows = rows[np.argsort(documents[rows], kind="stable")]
        for batch, here, within in _by_batch(self.documents, documents, rows):
            table = self._load(batch)
            tokens[here] = table["tokens"].to_numpy()[within]
            ids.append(table["id"].take(pa.array(within)))
            place[here] = np.arange(count, count + len(here))
            count += len(here)
        return tokens, pa.concat_arrays(ids).take(pa.array(place, mask=~known))

    def document_numbers(self, parts: NDArray[np.int64], ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of documents through all parts."""
        first_batch = np.searchsorted(self.place, np.searchsorted(self.numbers, parts))
        return self.documents[first_batch] + ordinals

    def _first_ordinal(self, batch: int) -> int:
        """Returns the ordinal of a batch's first document in its part."""
        return int(self.documents[batch] - self.documents[batch - self.batch[batch]])

    def _load(self, batch: int) -> Any:
        """Returns a batch of the index, mapped and not copied."""
        path = self.files[self.place[batch]]
        with read_errors(path):
            return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(int(self.batch[batch]))


def _by_batch(
    starts: NDArray[np.int64], numbers: NDArray[np.int64], by_number: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yields (batch, positions in `numbers`, numbers within the batch) of each batch with any of these numbers.

    Args:
        starts: The first number of each batch, and the end of the last.
        numbers: The numbers to look up, in any order.
        by_number: Positions in `numbers`, in the order of the numbers.
    """
    bounds = np.searchsorted(numbers[by_number], starts)
    for batch in np.flatnonzero(bounds[1:] > bounds[:-1]):
        rows = by_number[bounds[batch] : bounds[batch + 1]]
        yield int(batch), rows, numbers[rows] - starts[batch]


def _sums(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the sums of the first 0, 1, … counts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


class Permutation:
    """A permutation of 0..n-1, fixed by a label and a seed."""

    def __init__(self, n: int, label: str, seed: int) -> None:
        """Raises ValueError unless 1 <= n <= 2^40."""
        if not 1 <= n <= MOST:
            raise ValueError(f"a permutation of {n} indices; from 1 to 2^40 are supported")
        self.n, self.side = n, math.isqrt(n - 1) + 1
        keys = hashlib.sha512(f"{label}\0{seed}".encode()).digest()
        self.keys = [int.from_bytes(keys[8 * i : 8 * i + 8], "big") for i in range(ROUNDS)]

    def __call__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Returns the images of indices, of the same shape."""
        return self._walk(indices, self._forward)

    def inverse(self, images: ArrayLike) -> NDArray[np.int64]:
        """Returns the indices with these images, of the same shape."""
        return self._walk(images, self._backward)

    def _walk(self, values: ArrayLike, step: Callable[[Digits], Digits]) -> NDArray[np.int64]:
        given = np.asarray(values, np.int64)
        flat = given.ravel()
        if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= self.n):
            raise ValueError(f"an index is outside of 0..{self.n - 1}")
        result = np.empty_like(flat)
        for start in range(0, len(flat), SLICE):
            part = self._apply(flat[start : start + SLICE].view(np.uint64), step)
            # Cycle-walking: an image beyond n is permuted again, until it is below; few are, as the square is hardly
            # larger than n.
            while len(beyond := np.flatnonzero(part >= np.uint64(self.n))):
                part[beyond] = self._apply(part[beyond], step)
            result[start : start + SLICE] = part.view(np.int64)
        return result.reshape(given.shape)

    def _apply(self, values: NDArray[np.uint64], step: Callable[[Digits], Digits]) -> NDArray[np.uint64]:
        """Returns one pass of the network over the square, of which 0..n-1 is a part."""
        side = np.uint64(self.side)
        high = values // side
        high, low = step((high, values - high * side))
        high *= side
        high += low
        return high

    def _forward(self, digits: Digits) -> Digits:
        """Applies all rounds; a round is (left, right) -> (right, left + f(right))."""
        (left, right), side = digits, np.uint64(self.side)
        for key in self.keys:
            left += self._round(right, key)
            left -= side * (left >= side)
            left, right = right, left
        return left, right

    def _backward(self, digits: Digits) -> Digits:
        (left, right), side = digits, np.uint64(self.side)
        for key in reversed(self.keys):
            left, right = right, left
            left += side - self._round(right, key)
            left -= side * (left >= side)
        return left, right

    def _round(self, digit: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
        """Returns a keyed hash of a digit, below `side`.

        It is SplitMix64's finalizer (Steele et al., 2014), and a multiplication in place of a remainder (Lemire, 2019).
        """
        z = digit * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(key)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        # The upper half is the well-mixed one.
        z >>= np.uint64(32)
        z *= np.uint64(self.side)
        z >>= np.uint64(32)
        return z


class Place(NamedTuple):
    """A position in a stream, and the tokens (targets) of all chunks before it."""

    position: int
    tokens: int


def stream_name(source: str, pool: str) -> str:
    """Returns the name of a stream, in its label too: `<source>`, or `<source>/<pool>` where its chunks are divided."""
    return source if pool == ALL else f"{source}/{pool}"


@dataclass(frozen=True)
class Stream:
    """The chunks of one pool of a source, in every epoch in another order.

    Attributes:
        source: Name of the source.
        pool: Name of the pool.
        share: Share of all tokens that the phase reads.
        index: The chunks of the source.
        label: Label of the permutations.
        seed: Seed of the permutations.
    """

    source: str
    pool: str
    share: float
    index: ChunkIndex
    label: str
    seed: int

    @property
    def name(self) -> str:
        return stream_name(self.source, self.pool)

    @cached_property
    def size(self) -> int:
        """Chunks of an epoch."""
        return self.index.count(self.pool)

    def chunks(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the chunk at each of these ascending positions."""
        # Positions ascend, so each epoch is one slice.
        epochs, places = np.divmod(positions, self.size)
        first, last = (int(epochs[0]), int(epochs[-1])) if len(epochs) else (0, -1)
        bounds = np.searchsorted(epochs, np.arange(first, last + 2))
        parts = [
            self._permutation(epoch)(places[begin:end])
            for epoch, begin, end in zip(range(first, last + 1), bounds, bounds[1:], strict=False)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def position(self, chunk: int, epoch: int) -> int:
        """Returns the position at which an epoch reads a chunk, the inverse of `chunks`."""
        return epoch * self.size + int(self._permutation(epoch).inverse(chunk))

    def read(self, positions: NDArray[np.int64]) -> dict[str, Any]:
        """Returns the columns of the chunks at these ascending positions."""
        return self.index.read(self.pool, self.chunks(positions))

    def lengths(self, first: int, end: int) -> NDArray[np.int64]:
        """Returns the number of targets of each chunk at positions `first` to `end`, exclusive."""
        columns = self.index.read(self.pool, self.chunks(np.arange(first, end)), ids=False)
        return np.asarray(columns["length"], np.int64) - 1

    def tokens_before(self, position: int, work: Path, turn: float = 0.0) -> int:
        """Returns the number of targets of all chunks before a position; `work` and `turn` are as in `sums`."""
        epoch, place = divmod(position, self.size)
        begin = epoch * self.size
        tokens: int = epoch * self.index.slots[self.pool]
        if not place:
            return tokens
        for first, total in self.sums(epoch, place, work, turn):
            if first + STRIDE > place:
                return tokens + int(self.lengths(begin + first, position).sum())
            tokens += total
        return tokens

    def locate(self, tokens: int, work: Path, turn: float = 0.0) -> Place:
        """Returns the first position before which there are at least so many tokens.

        `work` and `turn` are as in `sums`.
        """
        epoch, missing = divmod(tokens, self.index.slots[self.pool])
        before, begin = tokens - missing, epoch * self.size
        if not missing:
            return Place(begin, before)
        likely = self.size * missing // self.index.slots[self.pool]
        for first, total in self.sums(epoch, likely, work, turn):
            if total >= missing:
                sums = np.cumsum(self.lengths(begin + first, begin + min(first + STRIDE, self.size)))
                last = int(np.searchsorted(sums, missing))
                return Place(begin + first + last + 1, before + int(sums[last]))
            missing, before = missing - total, before + total
        raise AssertionError("the sums of an epoch are those of its chunks")

    def sums(self, epoch: int, until: int, work: Path, turn: float) -> Iterator[tuple[int, int]]:
        """Yields (first place, targets of the chunks of STRIDE places) through an epoch.

        Missing sums are sealed in `work`. Those up to the place `until` are made first, beginning at the fraction
        `turn` of them, so that processes with different turns share that work.
        """
        runs = until // RUN + 1
        for k in range(runs):
            self._run_sums(epoch, (k + int(turn * runs)) % runs, work)
        for run in range(-(-self.size // RUN)):
            for k, total in enumerate(self._run_sums(epoch, run, work)):
                yield run * RUN + k * STRIDE, total

    def _run_sums(self, epoch: int, run: int, work: Path) -> list[int]:
        def make(folder: Path) -> dict[str, Any]:
            first = epoch * self.size + run * RUN
            lengths = self.lengths(first, min(first + RUN, (epoch + 1) * self.size))
            return {"sums": np.add.reduceat(lengths, np.arange(0, len(lengths), STRIDE)).tolist()}

        sums: list[int] = seal_part(work / "sums" / self.name, f"{epoch:04d}-{run:05d}", make).facts["sums"]
        return sums

    def _permutation(self, epoch: int) -> Permutation:
        return _permutation(self.size, f"{self.label}/{self.name}/epoch {epoch}", self.seed)


@lru_cache(maxsize=1024)
def _permutation(n: int, label: str, seed: int) -> Permutation:
    return Permutation(n, label, seed)
