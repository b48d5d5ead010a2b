"""Cost model in closed form: FLOPs of a token, and the memory of a rank of a layout.

No torch: `atom plan` imports this file. `tests/test_costs.py` compares the parameters with those that Megatron builds,
`bench/planner.py` the FLOPs and the state with published figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Attention:
    """Equal attention layers: `qk` and `v` are the widths of one head's queries and keys, and of its values."""

    layers: int
    heads: int
    qk: int
    v: int
    window: int | None = None  # keys that a query sees at most

    def keys(self, sequence_length: int) -> float:
        """Keys that a causal query sees on average: half the row, or the mean of min(position, window)."""
        window = min(self.window or sequence_length, sequence_length)
        return window - window * window / (2 * sequence_length)


def training_flops(matrices: int, attention: Iterable[Attention], sequence_length: int) -> float:
    """Training FLOPs of one token: 2 forward and 4 backward for each matrix parameter that the token meets (the output
    head is one, the input table is looked up), and as much for each product of its query with a key and of a score
    with a value.

    This is how NVIDIA's published tables count (Megatron-Bridge, docs/performance-summary.md); Chowdhery et al. (2022,
    appendix B) count attention without causality. Nothing is added for recomputation: these are the model's FLOPs, not
    the machine's. Packed rows need less than this, since a document does not see the others of its row.
    """
    scores = sum(a.layers * a.heads * (a.qk + a.v) * a.keys(sequence_length) for a in attention)
    return 6.0 * (matrices + scores)


@dataclass(frozen=True)
class MemoryShare:
    """The parameters on one rank, by the group of ranks that shares their optimizer state: experts lie on fewer
    ranks."""

    dense: int
    experts: int
    table: int = 0  # of the dense ones, those of embedding and output head, which stay in bf16 under FP8

    def __add__(self, other: MemoryShare) -> MemoryShare:
        return MemoryShare(self.dense + other.dense, self.experts + other.experts, self.table + other.table)

    @property
    def all(self) -> int:
        return self.dense + self.experts


def layers_of(model: ModelConfig, layout: Layout, pipeline_rank: int) -> list[list[int]]:
    """The layers of each model chunk of a pipeline rank. Megatron deals chunks out in turns."""
    layers_per_chunk = model.layers // (layout.pipeline * layout.virtual_pipeline)
    starts = [(chunk * layout.pipeline + pipeline_rank) * layers_per_chunk for chunk in range(layout.virtual_pipeline)]
    return [list(range(start, start + layers_per_chunk)) for start in starts]


def layer_memory_share(model: ModelConfig, layout: Layout, layer: int) -> MemoryShare:
    """One layer's parameters on a rank. Norms and router are replicated on each tensor rank, matrices are cut."""
    hidden, head, tensor = model.hidden_size, model.head_dim, layout.tensor
    replicated = 2 * hidden + 2 * head
    matrices = 2 * hidden * head * (model.heads + model.kv_heads)
    if layer < model.dense_layers:
        return MemoryShare(replicated + (matrices + 3 * hidden * (model.dense_ffn_size or 0)) // tensor, 0)
    replicated += model.experts * hidden
    matrices += 3 * hidden * (model.shared_expert_ffn_size or 0)
    experts = model.experts // layout.expert * 3 * hidden * model.expert_ffn_size // layout.split_experts
    return MemoryShare(replicated + matrices // tensor, experts)


def memory_share(model: ModelConfig, padded_vocab_size: int, layout: Layout, pipeline_rank: int) -> MemoryShare:
    """The parameters of each rank at that place of the pipeline: tensor, expert and data ranks hold equally many.

    The first has the input table, the last the final norm and the output head; with tied embeddings a copy of the
    table, unless it is the first as well. (Biases of experts are no parameters: a few kilobytes.)
    """
    chunks = layers_of(model, layout, pipeline_rank)
    total = sum((layer_memory_share(model, layout, layer) for chunk in chunks for layer in chunk), MemoryShare(0, 0))
    first, last = pipeline_rank == 0, pipeline_rank == layout.pipeline - 1
    tables = first + (last and not (first and model.tie_embeddings))
    table = tables * padded_vocab_size * model.hidden_size // layout.tensor
    return total + MemoryShare(table + last * model.hidden_size, 0, table)


def sharing(layout: Layout) -> tuple[int, int]:
    """Ranks that share the optimizer state of one dense tensor (data x context), and of one expert."""
    return layout.data * layout.context, layout.ranks // (layout.split_experts * layout.expert * layout.pipeline)


def state_bytes(share: MemoryShare, layout: Layout, precision: Precision) -> float:
    """Bytes of weights, gradients and optimizer on a rank: Megatron's distributed optimizer.

    bf16: 2 (weight) + 4 (gradient) + 12 (fp32 weight, two moments) / ranks that share them: "18 bytes a parameter".
    fp32: 4 + 4 + 8 / ranks, since the optimizer's weights are slices of the model's. FP8 keeps bf16 weights, and
    Transformer Engine keeps two quantized copies of each layer's matrices for the micro-batches of a step (one as it
    is, one transposed): 2 more. That is how FP8 can run out of memory where bf16 fits.
    """
    weight, optimizer_bytes = (4, MOMENTS) if precision == "fp32" else (2, MASTER + MOMENTS)
    dense, experts = sharing(layout)
    quantized = 2 * (share.all - share.table) if precision not in ("fp32", "bf16") else 0
    return (
        (weight + GRADIENT) * share.all + optimizer_bytes * (share.dense / dense + share.experts / experts) + quantized
    )


def owned_bytes(share: MemoryShare, layout: Layout) -> float:
    """Bytes of fp32 weights and moments that a rank's optimizer owns: what it writes to a work checkpoint, and the copy
    in host memory that is written while training goes on."""
    dense, experts = sharing(layout)
    return (MASTER + MOMENTS) * (share.dense / dense + share.experts / experts)
