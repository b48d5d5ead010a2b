"""The streams of a phase: the chunks of a source, or of its long or its short chunks, permuted again in each epoch.

A position in a stream is the number of chunks before it, through all epochs. Positions and chunks are functions of each
other: a seeded Feistel network over pairs of digits permutes a square of side ceil(sqrt(n)), and cycle-walking leaves
out what lies beyond n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Time and memory are
the same for every n, so any step can be looked up in both directions. The number of tokens before a position needs sums
over the stream, which are made once in sealed runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.core.parts import seal_part
from stages.data.order.chunks import ALL, ChunkIndex

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
