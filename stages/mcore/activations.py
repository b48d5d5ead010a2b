"""Activation memory of a rank: the tensors that the forward pass saves for the backward pass. No torch: `atom plan`
imports this file.

The layers are ours: Megatron's with its unfused SwiGLU, between matrices of Transformer Engine or PyTorch. Assumed:
routing is balanced (each rank's experts get their share of the tokens; natural routing is not so even, and the fullest
rank needs more); the attention kernel saves queries, keys, values, output and log-sum-exp, but no scores; FP8's smaller
copies of matrix inputs are counted as bf16. Left out: transient tensors within one operation, communication buffers,
and the allocator's fragments. `tests/integration/test_costs.py` compares with what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.mcore.parallel_layout import Layout
from stages.models.qwen3_moe.config import ModelConfig, Precision
from stages.models.qwen3_moe.memory import layers_of

SLICE = 128
"""Queries that attend in one call where rows are packed: `stages.models.qwen3_moe.layer_spec.SLICE`."""


@dataclass(frozen=True)
class Rows:
    """One micro-batch: `rows` rows of `length` tokens. packed: several documents in a row."""

    rows: int
    length: int
    packed: bool = False


def layer_tensors(
    model: ModelConfig, layout: Layout, precision: Precision, rows: Rows, dense: bool, fused: bool = False
) -> dict[str, float]:
    """Bytes by tensor that one layer keeps for each of the rank's tokens.

    A rank's tokens are its share of a micro-batch under context and sequence parallelism, rows * length / (context *
    tensor). Between the projections it works on `tensor` times as many tokens and 1/tensor of the heads, which comes to
    the same. dense: one SwiGLU instead of experts. fused: SwiGLU as one kernel that keeps its input only, as in
    Megatron's `bias_activation_fusion`, which we do not use.
    """
    size = 4 if precision == "fp32" else 2
    hidden, q, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    tensors: dict[str, float] = {"layer's input": size * hidden, "its norm, input of the projection": size * hidden}
    if rows.packed:
        tensors |= {
            "queries and keys, normed, and 1/RMS, fp32": 4 * (q + kv + model.heads + model.kv_heads),
            "queries, keys (turned) and values": size * (q + 2 * kv * layout.cp),  # gathered over context ranks
            "cosines and sines": 8 * model.head_dim * layout.tp,
            "attention's output by slices of queries": size * q,
            # of each slice of queries, up to its last one: if one document fills the row, half of it on average
            "attention mask": size * (rows.length + SLICE) / 2 * layout.tp,
        }
    else:
        tensors |= {
            "queries, keys and values as projected": size * (q + 2 * kv),
            "queries and keys, normed and turned": size * (q + kv),
        }
    tensors |= {
        "attention's output": size * q,
        "log-sum-exp of the scores": 4 * model.heads,
        "input of the second half": size * hidden,
        "its norm": size * hidden,
    }
    saved = 1 if fused else 3  # silu(gate), up, their product
    if dense:
        ffn = model.intermediate_size or 0
        return tensors | {"gate and up": 2 * size * ffn, "SwiGLU": saved * size * ffn}
    copies, ffn = model.num_experts_per_tok, model.moe_intermediate_size
    shared = model.shared_expert_intermediate_size or 0
    return tensors | {
        # fp32 logits, their softmax for the balance loss, sparse probabilities, and the map of bytes
        "router": 13 * model.experts,
        "tokens sent to experts": size * hidden * copies * layout.split_experts,
        "experts' gate and up": 2 * size * ffn * copies,
        "experts' SwiGLU, and weighted": (saved if fused else saved + 1) * size * ffn * copies,
        "shared expert": (2 + saved) * size * shared,
    }


def in_flight(layout: Layout, pipeline_rank: int, micro_batches: int) -> float:
    """Micro-batches whose forward pass has been run and whose backward pass has not, at most, on a pipeline rank; with
    interleaved chunks a fraction, of all of the rank's layers.

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
    """Bytes at the peak of a step on a rank at that place of the pipeline. micro_batches: of a step, on one rank.

    With recompute = layer each layer keeps its input only, and the one whose backward pass runs has all its tensors.
    The last stage adds the final norm and the loss: logits, their fp32 softmax, and with bf16 a gradient of that size.
    """
    size = 4 if precision == "fp32" else 2
    tokens = rows.rows * rows.length / (layout.cp * layout.tp)
    layer_bytes = {
        dense: sum(layer_tensors(model, layout, precision, rows, dense, fused).values()) for dense in (False, True)
    }
    layers = [layer for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk]
    saved_bytes = [layer_bytes[layer < model.dense_layers] for layer in layers]
    input_bytes = size * model.hidden_size
    working = 0.0
    if layout.recompute == "layer":
        working, saved_bytes = max(saved_bytes) - input_bytes, [input_bytes] * len(layers)
    total = tokens * (in_flight(layout, pipeline_rank, micro_batches) * sum(saved_bytes) + working)
    if pipeline_rank == layout.pp - 1:
        total += tokens * 2 * input_bytes
        total += tokens * padded_vocab_size * (4 if precision == "fp32" else 6)  # tensor ranks cut the vocabulary
    return total
