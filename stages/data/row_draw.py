"""Draws the rows of a phase with one chunk in each row: the source and the chunk of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.data.chunks import Chunks
from stages.data.seeds import permutation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DataCursor:
    """A position in the data: the first step, and the rows of each source that were read before that step.

    `seed` orders the sources; a checkpoint passes it on, so that another recipe seed repeats no document.
    """

    first_step: int
    seed: int
    rows: dict[str, int] = field(default_factory=dict)


def draw_rows(
    chunks: Mapping[str, Chunks],
    mix: Mapping[str, float],
    counts: Sequence[int],
    first_step: int,
    label: str,
    seed: int,
    cursor: DataCursor,
) -> dict[str, NDArray[Any]]:
    """The columns of the order from `first_step` on: step, row, segment, source and those of the chunks.

    counts: rows of each step from the cursor's first step on. Rows of steps before `first_step` are drawn and left out.
    """
    import numpy as np

    names = sorted(mix)
    quota = apportion(mix, sum(counts))
    labels = np.repeat(np.arange(len(names)), [quota[name] for name in names])
    from_step = f" from step {cursor.first_step}" if cursor.first_step > 1 else ""
    labels = labels[permutation(len(labels), f"{label}/sources{from_step}", seed)]
    skipped = first_step - cursor.first_step
    rows_read = sum(counts[:skipped])  # rows that were read before the checkpoint
    counts = counts[skipped:]

    total = len(labels) - rows_read
    columns = {name: np.zeros(total, np.int64) for name in ("ordinal", "offset", "length", "loss_from")}
    ids = np.empty(total, dtype=object)
    for i, name in enumerate(names):
        count_read, positions = np.count_nonzero(labels[:rows_read] == i), np.flatnonzero(labels[rows_read:] == i)
        first = cursor.rows.get(name, 0) + int(count_read)
        size = len(chunks[name]["ordinal"])
        indices = _permuted_indices(size, first, len(positions), f"{label}/{name}", cursor.seed)
        for column, values in columns.items():
            values[positions] = chunks[name][column][indices]
        ids[positions] = chunks[name]["id"][indices]
    step = np.repeat(np.arange(first_step, first_step + len(counts)), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    source = np.array(names, dtype=object)[labels[rows_read:]]
    return {"step": step, "row": row, "segment": np.zeros(total, np.int64), "source": source, "id": ids, **columns}


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the shares that sum to `total` (largest remainder; ties by name)."""
    counts = {name: int(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name] * total, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _permuted_indices(size: int, first: int, count: int, label: str, seed: int) -> NDArray[np.int64]:
    """Indices `first` to `first + count - 1` of an endless sequence over 0..size-1, permuted again in each epoch."""
    import numpy as np

    epoch = first // size
    epochs = range(epoch, -(-(first + count) // size))
    parts = [permutation(size, f"{label}/epoch {n}", seed) for n in epochs]
    return np.concatenate([*parts, np.zeros(0, np.int64)])[first - epoch * size :][:count]
