"""Packing: assigns the chunks of a packed phase to rows.

A source's share of a packed phase is a share of tokens. Long chunks can be up-weighted: they are drawn separately, up
to a number of epochs; shorter chunks make up the difference, which is reported. Rows are filled by best fit among a
bounded number of open rows, in an order that depends only on the seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Context, Range
from pipeline.core.stage import Config
from stages.data.chunks import Chunks
from stages.data.seeds import permutation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OPEN_ROWS = 64
"""The number of open rows: a larger number fills rows better and mixes the order of long and short chunks more."""


class LongDocuments(Config):
    """Up-weighting of long documents: of each source, chunks of more than `over` tokens make up `share` of the tokens,
    unless they would be read more than `max_epochs` times. Shorter chunks then make up the difference, which is
    reported. Four epochs cost next to nothing (Muennighoff et al., 2023)."""

    over: Context = Field(description="tokens above which a chunk is long; usually the previous context length")
    share: Annotated[float, Range(0, 1, above=True, below=True)] = Field(
        description="share of the tokens of each source that come from long chunks"
    )
    max_epochs: Annotated[float, Range(0, 1000, above=True)] = Field(
        4.0, description="maximum number of times that a long chunk is read"
    )


def quotas(slots: NDArray[np.int64], tokens: float, rule: LongDocuments | None) -> dict[str, Any]:
    """The numbers of a source's tokens from its long and its short chunks.

    slots: targets of each chunk; tokens: the number that the phase reads of the source.
    """
    if rule is None:
        return {"short": tokens}
    long = slots > rule.over
    available, target = int(slots[long].sum()), rule.share * tokens
    allowed = min(target, rule.max_epochs * available)
    granted = tokens if long.all() else allowed  # no shorter chunks exist: the long ones are repeated more often
    return {
        "short": tokens - granted,
        "long": granted,
        "report": {
            "over": rule.over,
            "chunks": int(long.sum()),
            "available_tokens": available,
            "wanted_tokens": round(target),
            "missing_tokens": round(target - allowed),
        },
    }


def draw(slots: NDArray[np.int64], tokens: float, label: str, seed: int) -> NDArray[np.int64]:
    """Indices of chunks, permuted again in each epoch, until they hold `tokens` targets."""
    import numpy as np

    draws, drawn, epoch = [np.zeros(0, np.int64)], 0.0, 0
    while drawn < tokens and slots.sum() > 0:
        order = permutation(len(slots), f"{label}/epoch {epoch}", seed)
        sums = drawn + np.cumsum(slots[order])
        order = order[: int(np.searchsorted(sums, tokens)) + 1]
        draws.append(order)
        drawn, epoch = drawn + float(slots[order].sum()), epoch + 1
    return np.concatenate(draws)


def choose(chunks: Chunks, tokens: float, rule: LongDocuments | None, label: str, seed: int) -> tuple[Any, Any]:
    """(indices of the chunks that a phase reads of one source, the report on its long chunks or None)."""
    import numpy as np

    slots = np.asarray(chunks["length"]) - 1
    quota = quotas(slots, tokens, rule)
    if rule is None:
        return draw(slots, tokens, label, seed), None
    parts = []
    for name, mask in (("long", slots > rule.over), ("short", slots <= rule.over)):
        candidates = np.flatnonzero(mask)
        if len(candidates) and quota[name] > 0:
            parts.append(candidates[draw(slots[candidates], quota[name], f"{label}/{name}", seed)])
    indices = np.concatenate([*parts, np.zeros(0, np.int64)])
    return indices, quota["report"]


def pack(
    chunks: Mapping[str, Chunks], mix: Mapping[str, float], counts: Sequence[int], capacity: int,
    rule: LongDocuments | None, label: str, seed: int,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:  # fmt: skip
    """The order of a packed phase, and a report by source.

    chunks: by source, with columns ordinal, id, offset, length, loss_from; counts: rows of each step; capacity: targets
    of a row. The order has these columns, step, row, segment and source, sorted by step, row and segment.
    """
    import numpy as np

    rows, reports, parts = sum(counts), {}, []
    for name in sorted(mix):
        indices, long = choose(chunks[name], mix[name] * rows * capacity, rule, f"{label}/{name}", seed)
        reports[name] = {"long": long} if long else {}
        columns = {column: values[indices] for column, values in chunks[name].items()}
        parts.append({"source": np.full(len(indices), name, dtype=object), **columns})
    segments = {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
    shuffled = permutation(len(segments["length"]), f"{label}/segments", seed)
    segments = {column: values[shuffled] for column, values in segments.items()}
    items, row_index = fill(segments["length"] - 1, capacity, rows)
    row_index = permutation(rows, f"{label}/rows", seed)[row_index]
    by_row = np.argsort(row_index, kind="stable")
    items, row_index = items[by_row], row_index[by_row]
    step = np.repeat(np.arange(1, len(counts) + 1), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    table = {
        "step": step[row_index],
        "row": row[row_index],
        "segment": np.arange(len(row_index)) - np.searchsorted(row_index, row_index),
    }
    return table | {column: values[items] for column, values in segments.items()}, reports


def fill(slots: NDArray[np.int64], capacity: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assigns items to rows in their order: each to the open row that it fills best.

    slots: size of each item, at most `capacity`. Returns (item, row) of those that fit in the first `rows` rows, by row
    and then by position in it.
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
