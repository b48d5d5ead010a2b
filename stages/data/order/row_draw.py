"""Draws the rows of a phase with one chunk in each row: the source of every row, and its place in the source's stream.

The shares of the mix are exact over the phase. A binary tree deals each source's rows to blocks of rows: every node
gives each half its share, to the nearest whole row. The way from the root to one block is a few divisions, so any row
is found in the same time, in a phase of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.formats.seeds import permutation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Rows of a block, in which a seeded permutation mixes the sources.
BLOCK = 4096


@dataclass(frozen=True)
class DataCursor:
    """A position in the data: the first step, and the chunks of each stream that were read before that step.

    `seed` orders the sources; a checkpoint passes it on, so that another recipe seed repeats no document.
    """

    first_step: int
    seed: int
    rows: dict[str, int] = field(default_factory=dict)


class SourceDraw:
    """The source of each of `rows` rows. `names` are sorted; a source is named by its index in them."""

    def __init__(self, mix: Mapping[str, float], rows: int, label: str, seed: int) -> None:
        self.names, self.rows, self.label, self.seed = sorted(mix), rows, label, seed
        quota = apportion(mix, rows)
        self.totals = [quota[name] for name in self.names]

    def read(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (source, number of earlier rows of that source) of the rows from `first` to `end`, exclusive."""
        import numpy as np

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
        import numpy as np

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
        import numpy as np

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
