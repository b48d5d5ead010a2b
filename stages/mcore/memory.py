"""The memory of a rank of a layout, in closed form. No torch: `atom plan` imports this file."""

from __future__ import annotations

from stages.mcore.optimizer import OptimizerSettings
from stages.models.base import ModelConfig, Precision
from stages.models.costs import MemoryShare
from stages.models.parallel_layout import Layout

Kind = OptimizerSettings | type[OptimizerSettings]
GRADIENT = 4
"""Bytes of a gradient: summed over micro-batches and ranks in fp32."""
NVFP4 = 4.5 / 8
"""Bytes of a number of NVFP4: 4 bits, and its part of the 8 of a scale."""
MASTER = 4
"""Bytes of an fp32 weight; below fp32 it is a copy of the optimizer's, in fp32 the model's own."""


def layers_of(model: ModelConfig, layout: Layout, pipeline_rank: int) -> list[list[int]]:
    """The layers of each model chunk of a pipeline rank. Megatron assigns chunks in turns."""
    layers_per_chunk = model.layers // (layout.pp * layout.vpp)
    starts = [(chunk * layout.pp + pipeline_rank) * layers_per_chunk for chunk in range(layout.vpp)]
    return [list(range(start, start + layers_per_chunk)) for start in starts]


def memory_share(model: ModelConfig, padded_vocab_size: int, layout: Layout, pipeline_rank: int) -> MemoryShare:
    """The parameters of each rank at that position of the pipeline: tensor, expert and data ranks hold equally many.

    The first has the input table, the last the final norm and the output head; with tied embeddings a copy of the
    table, unless it is also the first. (Biases of experts do not count: a few kilobytes.)
    """
    chunks = layers_of(model, layout, pipeline_rank)
    total = sum((model.layer_memory(layout, layer) for chunk in chunks for layer in chunk), MemoryShare(0, 0))
    first, last = pipeline_rank == 0, pipeline_rank == layout.pp - 1
    tables = first + (last and not (first and model.tie_embeddings))
    table = tables * padded_vocab_size * model.hidden_size // layout.tp
    return total + MemoryShare(table + last * model.hidden_size, 0, table)


def sharing(layout: Layout) -> tuple[int, int]:
    """Ranks that share the optimizer state of one dense tensor (data x context), and of one expert."""
    return layout.data * layout.cp, layout.ranks // (layout.split_experts * layout.ep * layout.pp)


def state_bytes(share: MemoryShare, layout: Layout, precision: Precision, optimizer: Kind) -> float:
    """Returns the bytes of weights, gradients and optimizer on a rank: Megatron's distributed optimizer.

    bf16: 2 (weight) + 4 (gradient) + 12 (fp32 weight, two states) / ranks that share them: "18 bytes a parameter".
    fp32: 4 + 4 + 8 / ranks, since the optimizer's weights are slices of the model's. FP8 keeps bf16 weights, and
    Transformer Engine keeps two quantized copies of each layer's matrices for the micro-batches of a step (one as it
    is, one transposed): 2 more, and in NVFP4, of 4 bits and a scale of 8 for 16 of them, 1.125. That is how FP8 can run
    out of memory where bf16 fits.
    """
    weight, master = (4, 0) if precision == "fp32" else (2, MASTER)
    copies = {"fp32": 0.0, "bf16": 0.0, "nvfp4": 2 * NVFP4}.get(precision, 2.0)
    quantized = copies * (share.all - share.table)
    return (weight + GRADIENT) * share.all + _shared_bytes(share, layout, master, optimizer) + quantized


def owned_bytes(share: MemoryShare, layout: Layout, optimizer: Kind) -> float:
    """Returns the bytes of fp32 weights and states that a rank's optimizer owns.

    They are its part of a work checkpoint, and the size of the copy in host memory that is written while training
    continues.
    """
    return _shared_bytes(share, layout, MASTER, optimizer)


def _shared_bytes(share: MemoryShare, layout: Layout, weight: int, optimizer: Kind) -> float:
    """Returns the bytes of what ranks share out: `weight` bytes a parameter, and the optimizer's states."""
    dense, experts = sharing(layout)
    # Ranks share tensors by slices, or, if a kind takes whole tensors, by dealing them out: about the same size each.
    of_dense = weight * share.dense + optimizer.state_bytes(share.dense, share.table)
    return of_dense / dense + (weight * share.experts + optimizer.state_bytes(share.experts)) / experts
