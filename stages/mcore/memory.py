"""The memory of a rank of a layout, in closed form: parameters, optimizer, and activations.

No torch: `atom plan` imports this file. Activations are the tensors that the forward pass saves for the backward pass.
Their layers are those of this project: Megatron's with its unfused SwiGLU, between matrices of Transformer Engine or
PyTorch. Assumed: routing is balanced (real routing is less even, and the fullest rank needs more); the attention kernel
saves queries, keys, values, output and log-sum-exp, but no scores, unless the architecture states otherwise; NVFP4's
smaller copies of matrix inputs count as bf16. Left out: communication buffers and the allocator's fragments.

`tests/integration/models/test_costs.py` compares with what autograd saves, and
`tests/integration/models/test_rank_simulation.py` with every byte that a simulated rank allocates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

from stages.mcore.lora import Lora
from stages.mcore.optimizer import OptimizerSettings
from stages.models.base import SLICE, MemoryShare, ModelConfig, Precision, Rows, bytes_of
from stages.models.parallel_layout import LOSS_SLICE, Layout

Kind = OptimizerSettings | type[OptimizerSettings]
GRADIENT = 4
"""Bytes of a gradient that the optimizer reads: fp32. Its sum over micro-batches and ranks is too, by default."""
NVFP4 = 4.5 / 8
"""Bytes of a number of NVFP4: 4 bits, and its part of the 8 of a scale."""
MASTER = 4
"""Bytes of an fp32 weight; below fp32 it is a copy of the optimizer's, in fp32 the model's own."""
SOFTMAX = 4
"""Bytes of a logit in the loss, and of an element of the head's gradient summed over slices: fp32."""


def layers_of(model: ModelConfig, layout: Layout, pipeline_rank: int) -> list[list[int]]:
    """The layers of each model chunk of a pipeline rank. Megatron assigns chunks in turns."""
    ends = list(accumulate(layout.chunk_layers(model.layers), initial=0))
    return [list(range(ends[chunk], ends[chunk + 1])) for chunk in range(pipeline_rank, len(ends) - 1, layout.pp)]


def equal_layers(model: ModelConfig, layers: Iterable[int]) -> dict[int, int]:
    """Returns the first of these layers with the same tensors, for each of them: what one needs, all of them need."""
    first: dict[object, int] = {}
    return {layer: first.setdefault(tuple(model.mlp_shapes(layer).items()), layer) for layer in layers}


def memory_share(model: ModelConfig, padded_vocab_size: int, layout: Layout, pipeline_rank: int) -> MemoryShare:
    """The parameters of each rank at that position of the pipeline: tensor, expert and data ranks hold equally many.

    The first has the input table, the last the final norm and the output head; with tied embeddings a copy of the
    table, unless it is also the first. (Biases of experts do not count: a few kilobytes.)
    """
    equal = equal_layers(model, chain(*layers_of(model, layout, pipeline_rank)))
    shares = {layer: model.layer_memory(layout, layer) for layer in {*equal.values()}}
    total = sum((shares[layer] for layer in equal.values()), MemoryShare(0, 0))
    is_first, is_last = pipeline_rank == 0, pipeline_rank == layout.pp - 1
    # A tied table on two stages is a copy each.
    tables = [is_first, is_last and not (is_first and model.tie_embeddings)].count(True)
    table = tables * padded_vocab_size * model.hidden_size // layout.tp
    norm = model.hidden_size if is_last else 0
    return total + MemoryShare(table + norm, 0, table)


def sharing(layout: Layout) -> tuple[int, int]:
    """Ranks that share the optimizer state of one dense tensor (data x context), and of one expert."""
    # Context ranks hold equal weights, as data ranks do; expert ranks are divided anew.
    return layout.data * layout.cp, layout.ranks // (layout.split_experts * layout.ep * layout.pp)


def state_bytes(
    share: MemoryShare, layout: Layout, precision: Precision, optimizer: Kind, gradient: int = GRADIENT
) -> float:
    """Returns the bytes of weights, gradients and optimizer on a rank: Megatron's distributed optimizer.

    `gradient` is the bytes of one in the sums over micro-batches and ranks.

    bf16: 2 (weight) + 4 (gradient) + 12 (fp32 weight, two states) / ranks that share them: "18 bytes a parameter".
    fp32: 4 + 4 + 8 / ranks, since the optimizer's weights are slices of the model's. FP8 keeps bf16 weights, and
    Transformer Engine keeps two quantized copies of each layer's matrices for the micro-batches of a step (one as it
    is, one transposed): 2 more, and in NVFP4, of 4 bits and a scale of 8 for 16 of them, 1.125. That is how FP8 can run
    out of memory where bf16 fits.
    """
    weight, master = (4, 0) if precision == "fp32" else (2, MASTER)
    copies = {"fp32": 0.0, "bf16": 0.0, "nvfp4": 2 * NVFP4}.get(precision, 2.0)
    quantized = copies * (share.all - share.table)
    return (weight + gradient) * share.all + _shared_bytes(share, layout, master, optimizer) + quantized


def owned_bytes(share: MemoryShare, layout: Layout, optimizer: Kind) -> float:
    """Returns the bytes of fp32 weights and states that a rank's optimizer owns.

    They are its part of a work checkpoint, and the size of the copy in host memory that is written while training
    continues.
    """
    return _shared_bytes(share, layout, MASTER, optimizer)


def _shared_bytes(share: MemoryShare, layout: Layout, weight: int, optimizer: Kind) -> float:
    """Returns the bytes of what ranks share out, on the fullest: `weight` bytes a parameter, and the states."""
    dense, experts = sharing(layout)
    # The slice of one rank may lie in a table, whose states can be more than those of matrices.
    of_dense, of_experts = share.dense / dense, share.experts / experts
    states = optimizer.state_bytes(of_dense, min(share.table, of_dense)) + optimizer.state_bytes(of_experts)
    return weight * (of_dense + of_experts) + states


def in_flight(layout: Layout, pipeline_rank: int, micro_batches: int) -> float:
    """The maximum number of micro-batches between their forward and backward pass on a pipeline rank.

    With interleaved chunks it is a fraction, of all of the rank's layers.

    1F1B (Narayanan et al., 2021) holds one for each rank behind it, and its own one. Interleaved runs twice as far
    ahead, by chunks.
    """
    later_ranks = layout.pp - pipeline_rank - 1
    if layout.vpp == 1:
        return min(later_ranks + 1, micro_batches)
    # Warm-up micro-batches of the interleaved schedule (Narayanan et al., 2021, arXiv:2104.04473), by chunks.
    chunks = 2 * later_ranks + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, micro_batches * layout.vpp) / layout.vpp


@dataclass(frozen=True)
class Activations:
    """The activations of a rank, in bytes.

    Attributes:
        model: The model.
        padded_vocab_size: Rows of the embedding matrix.
        layout: The ranks.
        precision: The data type of matrix products.
        rows: A micro-batch.
        micro_batches: Micro-batches of a step on one rank.
        pipeline_rank: The position of the rank in the pipeline.
        fused: True if kernels are fused, as in `ModelConfig.layer_activations`.
        frozen: True if the embedding and the head have no gradients.
        has_z_loss: True if the output logits have a z-loss, with which the loss is sliced in any case.
    """

    model: ModelConfig
    padded_vocab_size: int
    layout: Layout
    precision: Precision
    rows: Rows
    micro_batches: int
    pipeline_rank: int
    fused: bool = False
    frozen: bool = False
    has_z_loss: bool = False

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return bytes_of(self.precision)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on this rank: context and sequence parallelism divide a row."""
        return self.rows.rows * self.rows.length / (self.layout.cp * self.layout.tp)

    @property
    def is_last(self) -> bool:
        """True for the last stage of the pipeline, which has the final norm, the head and the loss."""
        return self.pipeline_rank == self.layout.pp - 1

    @cached_property
    def chunks(self) -> list[list[int]]:
        """The layers of each model chunk of this rank."""
        return layers_of(self.model, self.layout, self.pipeline_rank)

    @cached_property
    def in_flight(self) -> float:
        """Micro-batches between their forward and their backward pass."""
        return in_flight(self.layout, self.pipeline_rank, self.micro_batches)

    def saved(self) -> float:
        """Returns the bytes that the forward passes in flight keep.

        With recompute = layer each layer keeps only its input, with selective all but the tensors of those modules.
        The last stage keeps the inputs of the final norm and of the output head, and the fp32 softmax of the logits,
        or, of a loss by slices, the gradients of the head and of its inputs; an earlier stage keeps its outputs. Packed
        rows have one table of rotary values for all layers.
        """
        saved = self._saved_by_layers()
        return saved + self._inputs_of_loss() + self._loss()[0] if self.is_last else saved

    def peak(self) -> float:
        """Returns the bytes at the peak of a step, the largest of three states.

        - A layer at work: what all layers keep, and its temporary tensors; if it is computed again, also all that it
          saves, the gradient of its output, and on the last stage that of a tied head, which waits for that of the
          embedding. A later stage still has the gradient that it sent last.
        - The loss, on the last stage: what all layers keep, the inputs of the final norm and of the head, and its
          tensors.
        - The end of a backward pass, on the first stage: what the other micro-batches in flight keep, and the gradient
          of the embedding, of a tied one beside that of the head and their sum.
        """
        layout, saved = self.layout, self._saved_by_layers()
        hidden = self.tokens * self.size * self.model.hidden_size
        table = self.size * self.model.hidden_size * self.padded_vocab_size / layout.tp
        is_tied = self.model.tie_embeddings and layout.pp == 1
        recomputes = layout.recompute == "layer"

        at_the_end = 0.0
        if self.pipeline_rank == 0 and not self.frozen:
            # The micro-batch whose backward pass ends keeps nothing any more.
            others = 1 - 1 / (layout.vpp * self.in_flight)
            at_the_end = others * saved + (3 if is_tied else 1) * table

        working = 0.0
        for chunk in self.chunks:
            # Backward from the last layer: what later layers keep is not there yet, or no longer.
            later = 0.0
            for layer in reversed(chunk):
                layer_kept, layer_working = self._layers[layer]
                working = max(working, self.tokens * (layer_working - later))
                later += layer_kept

        saved += self._gathered_ranks() * hidden
        if recomputes:
            saved += self._masks()  # of the micro-batch whose layers are computed again
            working += hidden
        if layout.vpp > 1:
            # Of each chunk an output on its way and what the next one has sent; later stages also have a gradient.
            saved += (3 if self.pipeline_rank > 0 else 2) * layout.vpp * hidden
        elif self.pipeline_rank > 0 and self.micro_batches > self.in_flight:
            saved += hidden  # the gradient that was sent last, until the next one replaces it
        if not self.is_last:
            return max(saved + working, at_the_end)

        if recomputes and is_tied and not self.frozen:
            working += table
        return max(saved + max(working, self._inputs_of_loss() + self._loss()[1]), at_the_end)

    def merged(self, lora: Lora) -> float:
        """Returns the bytes of the sums of matrices and adapters at the peak, and of the gradient of the largest one.

        Each micro-batch in flight keeps the sums of all layers; with recompute = layer, only the layer at work has
        them.
        """
        sums = lora.sums(self.model, self.layout)
        layers = [sums[layer] for chunk in self.chunks for layer in chunk]
        by_layer = [sum(sizes) for sizes in layers]
        kept = max(by_layer) if self.layout.recompute == "layer" else self.in_flight * sum(by_layer)
        return self.size * (kept + max(size for sizes in layers for size in sizes))

    def unkept(self, lora: Lora) -> float:
        """Returns the bytes in `peak` that adapters do not keep.

        They are the inputs of feed-forward matrices without an adapter, of which no gradient is wanted. The layer at
        work has them.
        """
        if "mlp" in lora.targets or self.layout.recompute != "none":
            return 0.0
        widths = [self.model.mlp_inputs(self.layout, layer) for chunk in self.chunks for layer in chunk]
        return self.size * self.tokens * (self.in_flight * sum(widths) - max(widths))

    def _saved_by_layers(self) -> float:
        """Returns the bytes that layers in flight keep, with what an earlier stage has sent on."""
        kept, rows, layout = 0.0, self.rows, self.layout
        for chunk in self.chunks:
            for layer in chunk:
                kept += self._layers[layer][0]
        if layout.vpp > 1 or not self.is_last:
            kept += layout.vpp * self.size * self.model.hidden_size
        # Cosines and sines, and masks: of all layers, and if rows are one document each, of all these rows.
        tables = self.tokens * 8 * self.model.rotary_dim * layout.tp / (1 if rows.packed else rows.rows)
        tables += self._masks() if layout.recompute != "layer" else 0.0
        return self.in_flight * self.tokens * kept + (self.in_flight if rows.packed else 1) * tables

    def _gathered_ranks(self) -> int:
        """Returns the number of ranks whose tokens are in a buffer that stays.

        It holds the inputs of a matrix of all tensor ranks, or those of all experts' ranks if each has all tokens.
        """
        return self.layout.tp if self.layout.tp > 1 else 0

    def _masks(self) -> float:
        """Returns the bytes of the masks of a micro-batch; one for all rows if these are one document each.

        In fp32 a GPU has no kernel for rows of several documents, or for parts of a row: attention then goes by slices
        of queries, each with the keys up to its end.
        """
        rows = self.rows
        if self.precision != "fp32" or rows.targets is not None or not (rows.packed or self.layout.cp > 1):
            return 0.0
        ends = [min(start + SLICE, rows.length) for start in range(0, rows.length, SLICE)]
        scores = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
        return self.size * scores / self.layout.cp * (rows.rows if rows.packed else 1)

    def _inputs_of_loss(self) -> float:
        """Returns the bytes of the inputs of the final norm and of the output head, which has only the targets'."""
        head = self.tokens if self.rows.targets is None else self.rows.targets
        return self.size * self.model.hidden_size * (self.tokens + head)

    def _loss(self) -> tuple[float, float]:
        """Returns the bytes of the loss: (kept for the backward pass, at the peak).

        All at once: the softmax; with bf16 a gradient of the logits beside it, then a gradient of the head beside that
        of the logits. By slices: the gradients of the head, in fp32, and of its inputs, which each tensor rank has for
        all tokens; beside them a slice's logits and softmax, or its gradient and its part of the head's; in the
        backward pass the scaled gradients. With targets, only these have logits, and an objective of their own, so that
        the backward pass computes the logits of the slices again.
        """
        layout, rows, size, hidden = self.layout, self.rows, self.size, self.model.hidden_size
        vocab = self.padded_vocab_size / layout.tp
        tokens = rows.rows * rows.length / layout.cp if rows.targets is None else rows.targets
        inputs, head = size * hidden * tokens, size * hidden * vocab
        converted = size if size < SOFTMAX else 0  # of a logit in the model's type beside the one in fp32

        # With targets and tensor ranks the loss is sliced in any case (language_model.py).
        is_sliced = layout.slices_loss(tokens, hidden, self.padded_vocab_size, self.has_z_loss)
        if not is_sliced and (rows.targets is None or layout.tp == 1):
            softmax, logits = SOFTMAX * vocab * tokens, size * vocab * tokens
            return softmax, max(softmax + converted * vocab * tokens, logits + (0 if self.frozen else head))

        kept = SOFTMAX * hidden * vocab + inputs
        width = min(tokens, LOSS_SLICE)
        products = size * vocab * width + (head if converted else 0)
        working = max((SOFTMAX + converted) * vocab * width, products)
        if rows.targets is not None:
            return 0, kept + max(working, head)
        gathered = inputs if layout.tp > 1 else 0
        return kept, kept + max(gathered + working, head + inputs)

    @cached_property
    def _layers(self) -> dict[int, tuple[float, float]]:
        """What `_layer` returns, by layer."""
        equal = equal_layers(self.model, chain(*self.chunks))
        computed = {layer: self._layer(layer) for layer in {*equal.values()}}
        return {layer: computed[first] for layer, first in equal.items()}

    def _layer(self, layer: int) -> tuple[float, float]:
        """Returns the bytes of a layer for each token: (kept for the backward pass, at work in it)."""
        model, layout, precision = self.model, self.layout, self.precision
        tensors = model.layer_activations(layout, precision, self.rows, layer, self.fused)
        saved, working = sum(tensors.values()), model.layer_working_set(layout, precision, self.rows, layer)
        if layout.recompute == "layer":
            kept = float(self.size * model.hidden_size)
        else:
            # In the backward pass the modules of one layer are there again.
            kept = saved - sum(tensors[name] for name in model.recomputed(layout.recomputed, layer))
        return kept, saved - kept + working
