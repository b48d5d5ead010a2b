"""The memory of a rank of a layout, in closed form: parameters, optimizer, and activations.

No torch: `atom plan` imports this file. Activations are the tensors that the forward pass saves for the backward pass.
Their layers are those of this project: Megatron's with its unfused SwiGLU, between matrices of Transformer Engine or
PyTorch. Assumed: routing is balanced (real routing is less even, and the fullest rank needs more); the attention kernel
saves queries, keys, values, output and log-sum-exp, but no scores, unless the architecture states otherwise; NVFP4's
smaller copies of matrix inputs count as bf16. Left out: communication buffers and the allocator's fragments.

`tests/integration/test_costs.py` compares with what autograd saves, `tests/integration/test_rank_simulation.py` with
every byte that a simulated rank allocates.
"""

from __future__ import annotations

from stages.mcore.lora import Lora
from stages.mcore.optimizer import OptimizerSettings
from stages.models.base import ModelConfig, Precision
from stages.models.costs import MemoryShare, Rows, sliced_attention
from stages.models.decoder import DecoderConfig
from stages.models.parallel_layout import LOSS_SLICE, Layout

Kind = OptimizerSettings | type[OptimizerSettings]
GRADIENT = 4
"""Bytes of a gradient: summed over micro-batches and ranks in fp32."""
NVFP4 = 4.5 / 8
"""Bytes of a number of NVFP4: 4 bits, and its part of the 8 of a scale."""
MASTER = 4
"""Bytes of an fp32 weight; below fp32 it is a copy of the optimizer's, in fp32 the model's own."""
SOFTMAX = 4
"""Bytes of a logit in the loss, and of an element of the head's gradient summed over slices: fp32."""


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


def saved_bytes(
    model: ModelConfig,
    padded_vocab_size: int,
    layout: Layout,
    precision: Precision,
    rows: Rows,
    micro_batches: int,
    pipeline_rank: int,
    fused: bool = False,
) -> float:
    """Bytes that the forward passes in flight keep on a rank at that position of the pipeline. micro_batches: of a
    step, on one rank. With recompute = layer each layer keeps only its input. The last stage keeps the inputs of the
    final norm and of the output head, and the fp32 softmax of the logits, or, of a loss by slices, the gradients of the
    head and of its inputs; an earlier stage keeps its outputs. Packed rows have one table of rotary values for all
    layers."""
    saved = _saved_by_layers(model, layout, precision, rows, micro_batches, pipeline_rank, fused)
    if pipeline_rank < layout.pp - 1:
        return saved
    saved_by_loss = _loss(model, padded_vocab_size, layout, precision, rows)[0]
    return saved + _inputs_of_loss(model, layout, precision, rows) + saved_by_loss


def activation_bytes(
    model: ModelConfig,
    padded_vocab_size: int,
    layout: Layout,
    precision: Precision,
    rows: Rows,
    micro_batches: int,
    pipeline_rank: int,
    fused: bool = False,
    frozen: bool = False,
) -> float:
    """Bytes at the peak of a step on a rank at that position of the pipeline, the largest of three states. frozen: the
    embedding and the head have no gradients.

    - A layer at work: what all layers keep, and its temporary tensors; if it is computed again, also all that it saves,
      the gradient of its output, and on the last stage that of a tied head, which waits for that of the embedding. A
      later stage still has the gradient that it sent last.
    - The loss, on the last stage: what all layers keep, the inputs of the final norm and of the head, and its tensors.
    - The end of a backward pass, on the first stage: what the other micro-batches in flight keep, and the gradient of
      the embedding, of a tied one beside that of the head and their sum.
    """
    saved = _saved_by_layers(model, layout, precision, rows, micro_batches, pipeline_rank, fused)
    tokens, size = _tokens(layout, rows), _size(precision)
    table = size * model.hidden_size * padded_vocab_size / layout.tp
    is_tied = model.tie_embeddings and layout.pp == 1
    at_the_end = 0.0
    if pipeline_rank == 0 and not frozen:
        others = 1 - 1 / (layout.vpp * in_flight(layout, 0, micro_batches))
        at_the_end = others * saved + (3 if is_tied else 1) * table
    working = 0.0
    for chunk in layers_of(model, layout, pipeline_rank):
        later = 0.0  # what later layers keep: not there yet, or no longer
        for layer in reversed(chunk):
            layer_kept, layer_working = _layer(model, layout, precision, rows, layer, fused)
            working = max(working, tokens * (layer_working - later))
            later += layer_kept
    hidden = tokens * size * model.hidden_size
    saved += _gathered_ranks(model, layout) * hidden
    if layout.recompute == "layer":
        saved += _masks(model, layout, precision, rows, fused)  # of the micro-batch whose layers are computed again
        working += hidden
    if layout.vpp > 1:
        # of each chunk an output on its way and what the next one has sent; later stages also have a gradient
        saved += (2 + (pipeline_rank > 0)) * layout.vpp * hidden
    elif pipeline_rank > 0 and micro_batches > in_flight(layout, pipeline_rank, micro_batches):
        saved += hidden  # the gradient that was sent last, until the next one replaces it
    if pipeline_rank < layout.pp - 1:
        return max(saved + working, at_the_end)
    if layout.recompute == "layer":
        working += (is_tied and not frozen) * table
    loss = _loss(model, padded_vocab_size, layout, precision, rows, frozen)[1]
    return max(saved + max(working, _inputs_of_loss(model, layout, precision, rows) + loss), at_the_end)


def merged_bytes(
    lora: Lora, model: ModelConfig, layout: Layout, precision: Precision, micro_batches: int, pipeline_rank: int
) -> float:
    """Bytes of the sums of matrices and adapters at the peak of a step on a rank at that position of the pipeline, and
    of the gradient of the largest one. Each micro-batch in flight keeps the sums of all layers; with recompute =
    layer, only the layer at work has them."""
    sums = lora.sums(model, layout)
    layers = [sums[layer] for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk]
    by_layer = [sum(sizes) for sizes in layers]
    if layout.recompute == "layer":
        kept = max(by_layer)
    else:
        kept = in_flight(layout, pipeline_rank, micro_batches) * sum(by_layer)
    return _size(precision) * (kept + max(size for sizes in layers for size in sizes))


def unkept_bytes(
    lora: Lora,
    model: ModelConfig,
    layout: Layout,
    precision: Precision,
    rows: Rows,
    micro_batches: int,
    pipeline_rank: int,
) -> float:
    """Bytes that `activation_bytes` counts and adapters do not keep: the inputs of feed-forward matrices without one,
    of which no gradient is wanted. The layer at work has them."""
    if "mlp" in lora.targets or layout.recompute == "layer":
        return 0.0
    assert isinstance(model, DecoderConfig), "adapters are of its matrices"
    layers = [layer for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk]
    widths = [model.mlp_inputs(layout, layer) for layer in layers]
    unkept = in_flight(layout, pipeline_rank, micro_batches) * sum(widths) - max(widths)
    return _size(precision) * _tokens(layout, rows) * unkept


def _saved_by_layers(
    model: ModelConfig,
    layout: Layout,
    precision: Precision,
    rows: Rows,
    micro_batches: int,
    pipeline_rank: int,
    fused: bool,
) -> float:
    """Bytes that the layers of the forward passes in flight keep, with what an earlier stage has sent on."""
    tokens, kept = _tokens(layout, rows), 0.0
    for layer in (layer for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk):
        kept += _layer(model, layout, precision, rows, layer, fused)[0]
    is_sent = layout.vpp > 1 or pipeline_rank < layout.pp - 1
    sent = is_sent * layout.vpp * _size(precision) * model.hidden_size
    count = in_flight(layout, pipeline_rank, micro_batches)
    # cosines and sines, and masks: of all layers, and if rows are one document each, of all these rows
    tables = tokens * 8 * model.rotary_dim * layout.tp / (1 if rows.packed else rows.rows)
    tables += _masks(model, layout, precision, rows, fused) if layout.recompute == "none" else 0.0
    return count * tokens * (kept + sent) + (count if rows.packed else 1) * tables


def _gathered_ranks(model: ModelConfig, layout: Layout) -> int:
    """The ranks whose tokens are in a buffer that stays: the inputs of a matrix of all tensor ranks, or those of all
    experts' ranks if each has the tokens of all."""
    experts = layout.ep * layout.split_experts if model.routing and layout.dispatcher == "allgather" else 1
    ranks = max(layout.tp, experts)
    return ranks if ranks > 1 else 0


def _masks(model: ModelConfig, layout: Layout, precision: Precision, rows: Rows, fused: bool) -> float:
    """Bytes of the masks of a micro-batch on a rank; one for all rows if these are one document each."""
    windows = model.masked_windows(layout, precision, rows, fused)
    by_query = sum(sliced_attention(rows, window)[0] for window in windows)
    return _size(precision) * by_query * rows.length / layout.cp * (rows.rows if rows.packed else 1)


def _inputs_of_loss(model: ModelConfig, layout: Layout, precision: Precision, rows: Rows) -> float:
    """Bytes of the inputs of the final norm and of the output head, which has those of the targets only."""
    tokens, token = _tokens(layout, rows), _size(precision) * model.hidden_size
    return token * (tokens + (tokens if rows.targets is None else rows.targets))


def _loss(
    model: ModelConfig, padded_vocab_size: int, layout: Layout, precision: Precision, rows: Rows, frozen: bool = False
) -> tuple[float, float]:
    """Bytes of the loss: (kept for the backward pass, at the peak). frozen: the head has no gradient.

    All at once: the softmax; with bf16 a gradient of the logits beside it, then a gradient of the head beside that of
    the logits. By slices: the gradients of the head, in fp32, and of its inputs, which each tensor rank has for all
    tokens; beside them a slice's logits and softmax, or its gradient and its part of the head's; in the backward pass
    the scaled gradients. With targets, only these have logits, and an objective of their own, so that the backward pass
    computes the logits of the slices again.
    """
    size, hidden, vocab = _size(precision), model.hidden_size, padded_vocab_size / layout.tp
    has_targets = rows.targets is not None
    tokens = rows.rows * rows.length / layout.cp if rows.targets is None else rows.targets
    inputs, head, converted = size * hidden * tokens, size * hidden * vocab, size if size < SOFTMAX else 0
    is_sliced = layout.slices_loss(tokens, hidden, padded_vocab_size) or (has_targets and layout.tp > 1)
    if not is_sliced:
        softmax, logits = SOFTMAX * vocab * tokens, size * vocab * tokens
        return softmax, max(softmax + converted * vocab * tokens, logits + (0 if frozen else head))
    kept = SOFTMAX * hidden * vocab + inputs
    width = min(tokens, LOSS_SLICE)
    products = size * vocab * width + (head if converted else 0)
    working = max((SOFTMAX + converted) * vocab * width, products)
    if has_targets:
        return 0, kept + max(working, head)
    gathered = inputs if layout.tp > 1 else 0
    return kept, kept + max(gathered + working, head + inputs)


def _layer(
    model: ModelConfig, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
) -> tuple[float, float]:
    """Bytes of a layer for each of the rank's tokens: (kept for the backward pass, at work in it)."""
    saved = sum(model.layer_activations(layout, precision, rows, layer, fused).values())
    working = model.layer_working_set(layout, precision, rows, layer)
    if layout.recompute == "none":
        return saved, working
    layer_input = _size(precision) * model.hidden_size
    return layer_input, saved - layer_input + working


def _size(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _tokens(layout: Layout, rows: Rows) -> float:
    return rows.rows * rows.length / (layout.cp * layout.tp)
