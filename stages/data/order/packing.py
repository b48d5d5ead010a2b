"""The chunks of the rows of a phase: one in each row, or packed.

With one chunk in each row, the shares of the mix are exact over the phase. A binary tree deals each source's rows to
blocks of rows: every node gives each half its share, to the nearest whole row. The way from the root to one block is a
few divisions, so any row is found in the same time, in a phase of any length.

In a packed phase, the chunks of a block are assigned to its rows. A source's share of it is a share of tokens. Long
chunks can be up-weighted: they are a stream of their own, read up to a number of epochs; shorter chunks make up the
difference, which is reported. Rows are filled by best fit among a bounded number of open rows, in an order that depends
only on the seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.data.order.chunks import LONG, SHORT
from stages.data.order.order_config import LongDocuments
from stages.formats.seeds import permutation

# The number of open rows: a larger number fills rows better and mixes the order of long and short chunks more.
OPEN_ROWS = 64
# Rows of a block, in which a seeded permutation mixes the sources.
BLOCK = 4096


class SourceDraw:
    """The source of each of `rows` rows. `names` are sorted; a source is named by its index in them."""

    def __init__(self, mix: Mapping[str, float], rows: int, label: str, seed: int) -> None:
        self.names, self.rows, self.label, self.seed = sorted(mix), rows, label, seed
        quota = apportion(mix, rows)
        self.totals = [quota[name] for name in self.names]

    def read(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (source, number of earlier rows of that source) of the rows from `first` to `end`, exclusive."""
        sources, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block in range(first // BLOCK, -(-end // BLOCK)):
            _, before, counts = self._find(lambda middle, _, block=block: block < middle)  # type: ignore[misc]
            labels = self._labels(block, counts)
            place = np.empty(len(labels), np.int64)
            for source, count in enumerate(before):
                rows = np.flatnonzero(labels == source)
                place[rows] = count + np.arange(len(rows))
            part = slice(max(first - block * BLOCK, 0), end - block * BLOCK)
            sources.append(labels[part])
            places.append(place[part])
        return np.concatenate(sources), np.concatenate(places)

    def row(self, source: int, place: int) -> int | None:
        """Returns the row of a source that has `place` earlier ones, the inverse of `read`; None without so many."""
        if place >= self.totals[source]:
            return None
        block, before, counts = self._find(lambda _, until: place < until[source])
        rows = np.flatnonzero(self._labels(block, counts) == source)
        return block * BLOCK + int(rows[place - before[source]])

    def _find(self, is_left: Callable[[int, list[int]], bool]) -> tuple[int, list[int], list[int]]:
        """Returns (block, rows of each source before it, rows of each source in it) of the block that is sought.

        `is_left(middle, until)` is true if the block is before the block `middle`, before which each source has `until`
        rows.
        """
        low, high, before, counts = 0, -(-self.rows // BLOCK), [0] * len(self.names), self.totals
        # The counts are divided from the whole down to one block, so that no block needs those before it.
        while high - low > 1:
            middle = (low + high) // 2
            left = _deal(counts, (middle - low) * BLOCK)
            until = [a + b for a, b in zip(before, left, strict=True)]
            if is_left(middle, until):
                high, counts = middle, left
            else:
                low, before, counts = middle, until, [a - b for a, b in zip(counts, left, strict=True)]
        return low, before, counts

    def _labels(self, block: int, counts: list[int]) -> NDArray[np.int64]:
        """Returns the source of each row of a block."""
        labels = np.repeat(np.arange(len(counts)), counts)
        return labels[permutation(len(labels), f"{self.label}/block {block}", self.seed)]


def _deal(counts: list[int], rows: int) -> list[int]:
    """Returns the part of each of these counts in `rows` of their rows (largest remainder; ties by place)."""
    total = sum(counts)
    shares = [divmod(count * rows, total) for count in counts]
    missing = rows - sum(share for share, _ in shares)
    largest = set(sorted(range(len(shares)), key=lambda place: (-shares[place][1], place))[:missing])
    return [share + (place in largest) for place, (share, _) in enumerate(shares)]


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Returns whole numbers in proportion to the shares that sum to `total` (largest remainder; ties by name)."""
    counts = {name: int(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name] * total, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def split(
    pools: Mapping[str, tuple[int, int]], tokens: float, rule: LongDocuments | None
) -> tuple[dict[str, float], dict[str, int] | None]:
    """Divides a source's share of the tokens among its pools.

    Args:
        pools: (chunks, targets) of each pool.
        tokens: The tokens that the phase reads of the source.
        rule: The up-weighting of long chunks; None without one.

    Returns:
        The share of each pool, and the report on the long chunks or None.
    """
    if rule is None:
        return dict.fromkeys(pools, 1.0), None
    chunks, available = pools[LONG]
    wanted = rule.share * tokens
    allowed = min(wanted, rule.max_epochs * available)
    # without shorter chunks the long ones are repeated more often
    long = allowed / tokens if pools[SHORT][0] else 1.0
    return {LONG: long, SHORT: 1.0 - long}, {
        "over": rule.over,
        "chunks": chunks,
        "available_tokens": available,
        "wanted_tokens": round(wanted),
        "missing_tokens": round(wanted - allowed),
    }


def pack(segments: Mapping[str, Any], capacity: int, rows: int, label: str, seed: int) -> dict[str, Any]:
    """Assigns the segments of a block to its rows.

    Args:
        segments: Columns as numpy and Arrow arrays; `length` is one more than the targets. Their targets are at least
            rows x capacity, so that no row is empty.
        capacity: Targets of a row.
        rows: Rows of the block.
        label: Label of the permutations.
        seed: Seed of the permutations.

    Returns:
        The columns `row_index`, `segment` and those of the segments that fit, by row and segment.
    """
    # Shuffled before filling, so that the rows of a block mix the sources.
    shuffled = permutation(len(segments["length"]), f"{label}/segments", seed)
    items, row_index = fill(segments["length"][shuffled] - 1, capacity, rows)
    # Rows close in an order that depends on the lengths; a second permutation removes that.
    row_index = permutation(rows, f"{label}/rows", seed)[row_index]
    by_row = np.argsort(row_index, kind="stable")
    items, row_index = shuffled[items[by_row]], row_index[by_row]
    segment = np.arange(len(row_index)) - np.searchsorted(row_index, row_index)
    return {"row_index": row_index, "segment": segment} | {
        name: values.take(items) for name, values in segments.items()
    }


def fill(slots: NDArray[np.int64], capacity: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assigns items to rows in their order: each to the open row that it fills best.

    Args:
        slots: Size of each item, at most `capacity`.
        capacity: Size of a row.
        rows: Number of rows.

    Returns:
        (item, row) of those that fit in the first `rows` rows, by row and then by position in it.
    """
    open_: list[tuple[int, int]] = []  # (room, row), ascending
    row_of = np.full(len(slots), -1, np.int64)
    rank: dict[int, int] = {}  # row -> its position in the order of closing
    opened = 0
    for item, size in enumerate(slots.tolist()):
        index = bisect.bisect_left(open_, (size, -1))
        if index < len(open_):
            room, row = open_.pop(index)
        else:
            if len(open_) == OPEN_ROWS:
                rank[open_.pop(0)[1]] = len(rank)  # the fullest
            # Further items could only begin rows that the block does not have.
            if len(rank) >= rows:
                break
            room, row, opened = capacity, opened, opened + 1
        row_of[item] = row
        if room > size:
            bisect.insort(open_, (room - size, row))
        else:
            rank[row] = len(rank)
    for _, row in open_:
        rank[row] = len(rank)
    row_number = np.full(opened + 1, -1, np.int64)
    for row, closing_rank in rank.items():
        row_number[row] = closing_rank if closing_rank < rows else -1
    row_index = row_number[row_of]
    items = np.flatnonzero(row_index >= 0)
    items = items[np.argsort(row_index[items], kind="stable")]
    return items, row_index[items]
