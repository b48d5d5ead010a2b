"""Packing: assigns the chunks of a block of a packed phase to its rows.

A source's share of a packed phase is a share of tokens. Long chunks can be up-weighted: they are a stream of their own,
read up to a number of epochs; shorter chunks make up the difference, which is reported. Rows are filled by best fit
among a bounded number of open rows, in an order that depends only on the seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pipeline.core.bounds import Context, Range, Share
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, added
from stages.data.order.chunks import LONG, SHORT
from stages.formats.seeds import permutation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The number of open rows: a larger number fills rows better and mixes the order of long and short chunks more.
OPEN_ROWS = 64


class LongDocuments(Config):
    """Up-weighting of long documents.

    In each source, chunks of more than `over` tokens make up `share` of the tokens, unless they would be read more than
    `max_epochs` times. Shorter chunks then make up the difference, which is reported. Four epochs cost next to nothing
    (Muennighoff et al., 2023).
    """

    over: Context
    """tokens above which a chunk is long; usually the previous context length"""
    share: Annotated[float, Range(0, 1, above=True, below=True)]
    """share of the tokens of each source that come from long chunks"""
    max_epochs: Annotated[float, Range(0, 1000, above=True)] = 4.0
    """maximum number of times that a long chunk is read"""
    max_missing: Share = added(1.0)
    """share of the requested long tokens of a source that may be missing; with more, the order is refused"""


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


def require_enough(long: Mapping[str, Mapping[str, int]], rule: LongDocuments) -> None:
    """Raises AtomError with the sources that lack more long chunks than the rule allows.

    Args:
        long: The report on the long chunks of each source.
        rule: The up-weighting of long chunks.
    """
    lacks = [
        f"{source} has {row['available_tokens']:,} tokens in {row['chunks']:,} chunks of more than {row['over']:,}, "
        f"and {row['missing_tokens']:,} of {row['wanted_tokens']:,} asked tokens are missing"
        for source, row in long.items()
        if row["missing_tokens"] > rule.max_missing * row["wanted_tokens"]
    ]
    if lacks:
        raise AtomError(
            f"order: {'; '.join(lacks)}; long_documents.max_missing = {rule.max_missing:g} allows no more: "
            "add long documents, lower share, or raise max_epochs or max_missing"
        )


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
    import numpy as np

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
    import numpy as np

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
