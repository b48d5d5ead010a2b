"""Activation memory of a rank: the tensors that the forward pass saves for the backward pass. No torch: `atom plan`
imports this file.

The layers are those of this project: Megatron's with its unfused SwiGLU, between matrices of Transformer Engine or
PyTorch. Assumed: routing is balanced (each rank's experts get their share of the tokens; real routing is less even, and
the fullest rank needs more); the attention kernel saves queries, keys, values, output and log-sum-exp, but no scores;
FP8's smaller
copies of matrix inputs are counted as bf16. Left out: transient tensors within one operation, communication buffers,
and the allocator's fragments. `tests/integration/test_costs.py` compares with what autograd saves.
"""

from __future__ import annotations

from stages.mcore.memory import layers_of
from stages.mcore.parallel_layout import Layout
from stages.models.base import ModelConfig, Precision
from stages.models.costs import Rows


def in_flight(layout: Layout, pipeline_rank: int, micro_batches: int) -> float:
    """The maximum number of micro-batches between their forward and backward pass on a pipeline rank; with interleaved
    chunks a fraction, of all of the rank's layers.

    1F1B (Narayanan et al., 2021): the ranks behind it, and its own one. Interleaved: twice as far ahead, by chunks.
    """
    later_ranks = layout.pp - pipeline_rank - 1
    if layout.vpp == 1:
        return min(later_ranks + 1, micro_batches)
    chunks = 2 * later_ranks + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, micro_batches * layout.vpp) / layout.vpp


def activation_bytes(
    model: ModelConfig,
    padded_vocab_size: int,
    layout: Layout,
    precision: Precision,
    rows: Rows,
    micro_batches: int,
    pipeline_rank: int,
    fused: bool = False,
) -> float:
    """Bytes at the peak of a step on a rank at that position of the pipeline. micro_batches: of a step, on one rank.

    With recompute = layer each layer keeps only its input, and the layer in its backward pass has all its tensors.
    The last stage adds the final norm and the loss: logits, their fp32 softmax, and with bf16 a gradient of that size.
    """
    size = 4 if precision == "fp32" else 2
    tokens = rows.rows * rows.length / (layout.cp * layout.tp)
    layers = [layer for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk]
    saved_bytes = [sum(model.layer_activations(layout, precision, rows, layer, fused).values()) for layer in layers]
    input_bytes = size * model.hidden_size
    working = 0.0
    if layout.recompute == "layer":
        working, saved_bytes = max(saved_bytes) - input_bytes, [input_bytes] * len(layers)
    tables = 8 * model.rotary_dim * layout.tp * rows.packed  # cosines and sines, which all layers share
    total = tokens * (in_flight(layout, pipeline_rank, micro_batches) * (sum(saved_bytes) + tables) + working)
    if pipeline_rank == layout.pp - 1:
        total += tokens * 2 * input_bytes
        total += tokens * padded_vocab_size * (4 if precision == "fp32" else 6)  # tensor ranks split the vocabulary
    return total
