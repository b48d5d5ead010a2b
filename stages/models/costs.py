"""Units in which an architecture states its costs: attention, parameters on a rank, and rows of a micro-batch.

No torch: `atom plan` imports this file. `tests/integration/models/test_costs.py` compares the parameters with those
that Megatron builds, `bench/planner.py` the FLOPs and the state with published figures.
"""

from __future__ import annotations

from dataclasses import dataclass

SLICE = 128
"""Queries in one call of attention by slices (stages/mcore/row_tables.py)."""


@dataclass(frozen=True)
class AttentionCost:
    """Equal attention layers: `qk` and `v` are the widths of one head's queries and keys, and of its values."""

    layers: int
    heads: int
    qk: int
    v: int

    def keys(self, sequence_length: int) -> float:
        """Keys that a causal query sees on average: half the row."""
        return sequence_length / 2


def training_flops(matrices: float, attention: AttentionCost, sequence_length: int) -> float:
    """Training FLOPs of one token, 2 forward and 4 backward for each matrix parameter that the token uses.

    The output head counts, but not the input table, which is a lookup. Each product of the token's query with a key and
    of a score with a value counts in the same way.

    NVIDIA's published tables count in the same way (docs/performance-summary.md of Megatron-Bridge); Chowdhery et al.
    (2022, appendix B) count attention without causality. Recomputation is not added: these are the model's FLOPs, not
    the machine's. Packed rows need fewer, because a document does not see the others of its row.
    """
    widths = attention.layers * attention.heads * (attention.qk + attention.v)
    # Two FLOPs a multiply-add, once forward and twice backward: of inputs and of weights (Kaplan et al., 2020).
    return 6.0 * (matrices + widths * attention.keys(sequence_length))


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
    that documents have in common, counted with each but the first.
    """

    rows: int
    length: int
    packed: bool = False
    targets: int | None = None
    prefixed: int = 0
