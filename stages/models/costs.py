"""Cost model in closed form: FLOPs of a token, and the units in which an architecture states memory.

No torch: `atom plan` imports this file. `tests/integration/models/test_costs.py` compares the parameters with those
that Megatron builds, `bench/planner.py` the FLOPs and the state with published figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

SLICE = 128
"""Queries in one call of attention by slices (stages/mcore/row_tables.py)."""


@dataclass(frozen=True)
class AttentionCost:
    """Equal attention layers: `qk` and `v` are the widths of one head's queries and keys, and of its values."""

    layers: int
    heads: int
    qk: int
    v: int
    window: int | None = None  # maximum keys that a query sees
    kv_heads: int | None = None  # heads with keys and values of their own; None: all

    def keys(self, sequence_length: int) -> float:
        """Keys that a causal query sees on average: half the row, or the mean of min(position, window)."""
        window = min(self.window or sequence_length, sequence_length)
        # The mean of min(position, window) over a row of n tokens is w - w^2 / 2n.
        return window - window * window / (2 * sequence_length)

    def cached(self, tokens: int, ranks: int) -> int:
        """Numbers in the keys and values that a text of so many tokens leaves on each of so many tensor ranks.

        Ranks beyond the number of heads hold copies; a window keeps its own tokens.
        """
        heads = -(-(self.kv_heads or self.heads) // ranks)
        return self.layers * heads * (self.qk + self.v) * min(self.window or tokens, tokens)


@dataclass(frozen=True)
class StateCost(AttentionCost):
    """Equal layers of linear attention: each head has a state of `qk` x `v` numbers, whatever the length of a row."""

    def keys(self, sequence_length: int) -> float:
        """The keys that cost as much as a token's products with the state.

        They are counted as four products of its size, as NVIDIA counts the delta rule (flop_utils.py of
        Megatron-Bridge).
        """
        return 4 * self.qk * self.v / (self.qk + self.v)

    def cached(self, tokens: int, ranks: int) -> int:
        """No keys and values: the model counts its states."""
        return 0


def training_flops(matrices: int, attention: Iterable[AttentionCost], sequence_length: int) -> float:
    """Training FLOPs of one token, 2 forward and 4 backward for each matrix parameter that the token uses.

    The output head counts, but not the input table, which is a lookup. Each product of the token's query with a key and
    of a score with a value counts in the same way.

    NVIDIA's published tables count in the same way (docs/performance-summary.md of Megatron-Bridge); Chowdhery et al.
    (2022, appendix B) count attention without causality. Recomputation is not added: these are the model's FLOPs, not
    the machine's. Packed rows need fewer, because a document does not see the others of its row.
    """
    scores = sum(a.layers * a.heads * (a.qk + a.v) * a.keys(sequence_length) for a in attention)
    # Two FLOPs a multiply-add, once forward and twice backward: of inputs and of weights (Kaplan et al., 2020).
    return 6.0 * (matrices + scores)


@dataclass(frozen=True)
class MemoryShare:
    """The parameters on one rank, by the group of ranks that shares their optimizer state.

    Experts lie on fewer ranks.
    """

    dense: int
    experts: int
    table: int = 0  # of the dense ones: embedding and output head, which stay in bf16 under FP8

    def __add__(self, other: MemoryShare) -> MemoryShare:
        return MemoryShare(self.dense + other.dense, self.experts + other.experts, self.table + other.table)

    @property
    def all(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Rows:
    """One micro-batch: `rows` rows of `length` tokens.

    packed: several documents in a row. targets: tokens for which logits are computed; None: all. prefixed: keys
    that documents have in common, counted with each but the first. longest: keys of the longest document, its
    prefix among them; None: those of a row.
    """

    rows: int
    length: int
    packed: bool = False
    targets: int | None = None
    prefixed: int = 0
    longest: int | None = None


@cache
def sliced_attention(rows: Rows, window: int | None) -> tuple[float, float]:
    """The scores and the keys for each query, when each slice of SLICE queries is computed by itself.

    A row has one document unless `rows` states its longest. A slice sees no keys before its window or its first
    document. Documents of rows with targets are computed as batches, each with its own keys.
    """
    if rows.targets is not None:
        # Each document but the first has keys of its prefix once more.
        return rows.longest or rows.length, 1 + rows.prefixed / (rows.rows * rows.length)
    most = min(window or rows.length, rows.longest or rows.length)
    slices = [(start, min(start + SLICE, rows.length)) for start in range(0, rows.length, SLICE)]
    keys = [end - max(0, start + 1 - most) for start, end in slices]
    scores = sum((end - start) * count for (start, end), count in zip(slices, keys, strict=True))
    return scores / rows.length, sum(keys) / rows.length
