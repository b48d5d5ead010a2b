"""Decoders whose layers are an attention and a feed-forward part, each behind a norm. No torch here.

This module has their tensors and the costs of a layer in closed form, from those of the two parts.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from stages.models.base import ModelConfig, Precision
from stages.models.costs import MemoryShare, Rows
from stages.models.parallel_layout import Layout

EIGHT_BITS: tuple[Precision, ...] = ("fp8-tensorwise", "fp8-blockwise", "mxfp8")
EIGHT_BITS_BYTES = 1 + 1 / 32
"""Bytes of a number of these formats, with its part of a scale: 4 bytes for 128, or one for 32."""


class DecoderConfig(ModelConfig):
    """A decoder that states its attention and its feed-forward part."""

    @staticmethod
    def has_engine_attention(layout: Layout, precision: Precision, rows: Rows, fused: bool) -> bool:
        """Returns True if attention is surely Transformer Engine's; this project's attention keeps more.

        That is so in plain rows if the precision or the layout needs it, or if `fused` states it.
        """
        return not rows.packed and (fused or layout.needs_engine or precision not in ("fp32", "bf16"))

    # -- the attention of a layer -------------------------------------------------------------------------------------

    @abstractmethod
    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer's attention, by their names after `self_attention.`."""

    @abstractmethod
    def attention_memory(self, layer: int) -> tuple[int, int]:
        """Parameters of a layer's attention: (whole on each tensor rank, cut by tensor parallelism).

        The second are those before they are cut.
        """

    @abstractmethod
    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        """Bytes by tensor that the attention of a layer keeps for each of the rank's tokens, without its input.

        fused: as in `layer_activations`.
        """

    def attention_inputs(self, layer: int) -> int:
        """Numbers in the inputs of a layer's attention matrices that are kept quantized alone.

        Transformer Engine keeps these without a copy in bf16. The count is for each of the rank's tokens.
        """
        return self.hidden_size

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens."""
        return 0.0

    # -- the feed-forward part of a layer -----------------------------------------------------------------------------

    @abstractmethod
    def mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer's feed-forward part, by their names after `mlp.`."""

    @abstractmethod
    def mlp_parameters(self) -> tuple[int, int]:
        """(all parameters, active parameters of one token) of the feed-forward parts of all layers."""

    @abstractmethod
    def mlp_matrices(self) -> int:
        """Matrix parameters that one token uses in the feed-forward parts of all layers."""

    @abstractmethod
    def mlp_memory(self, layout: Layout, layer: int) -> tuple[int, int, int]:
        """Parameters of the feed-forward part of a layer, in three counts.

        The first are whole on each tensor rank. The second are cut by tensor parallelism, and are counted
        before that. The third are those of the experts on one rank.
        """

    @abstractmethod
    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        """Bytes by tensor that the feed-forward part of a layer keeps for each of the rank's tokens.

        size: bytes of a value.
        """

    def mlp_inputs(self, layout: Layout, layer: int) -> int:
        """Numbers in the inputs of the feed-forward matrices of a layer for each of the rank's tokens.

        They leave out the norm that a router and shared experts read too.
        """
        shapes, at = self.mlp_shapes(layer), "experts.local_experts.0."
        if at + "linear_fc1.weight" not in shapes:
            return sum(shapes[f"{name}.weight"][1] for name in ("linear_fc1", "linear_fc2"))
        assert self.routing is not None
        inner, hidden = (shapes[f"{at}{name}.weight"][1] for name in ("linear_fc2", "linear_fc1"))
        shared = shapes.get("shared_experts.linear_fc2.weight", (0, 0))[1]
        return self.routing.top_k * (inner + hidden * layout.split_experts) + shared

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        """As `attention_working_set`, of the feed-forward part."""
        return 0.0

    # -- the interface of every architecture --------------------------------------------------------------------------

    def shapes(self, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded_vocab_size, hidden)}
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            out[at + "input_layernorm.weight"] = (hidden,)
            out |= {f"{at}self_attention.{name}": shape for name, shape in self.attention_shapes(layer).items()}
            out[at + "pre_mlp_layernorm.weight"] = (hidden,)
            out |= {f"{at}mlp.{name}": shape for name, shape in self.mlp_shapes(layer).items()}
        out["decoder.final_layernorm.weight"] = (hidden,)
        if not self.tie_embeddings:
            out["output_layer.weight"] = (padded_vocab_size, hidden)
        return out

    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        hidden = self.hidden_size
        embedding = padded_vocab_size * hidden
        rest = embedding * (1 if self.tie_embeddings else 2) + hidden
        for layer in range(self.layers):
            rest += 2 * hidden + sum(math.prod(shape) for shape in self.attention_shapes(layer).values())
        total, active = self.mlp_parameters()
        return {"total": rest + total, "active": rest + active, "embedding": embedding}

    def matrices(self, padded_vocab_size: int) -> int:
        shapes = (shape for layer in range(self.layers) for shape in self.attention_shapes(layer).values())
        # Vectors, such as norms and biases, cost no product.
        attention = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
        return attention + self.mlp_matrices() + padded_vocab_size * self.hidden_size

    def layer_memory(self, layout: Layout, layer: int) -> MemoryShare:
        whole, cut = self.attention_memory(layer)
        mlp_whole, mlp_cut, experts = self.mlp_memory(layout, layer)
        return MemoryShare(2 * self.hidden_size + whole + mlp_whole + (cut + mlp_cut) // layout.tp, experts)

    def layer_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool = False
    ) -> dict[str, float]:
        """Bytes by tensor that the backward pass of a layer needs, for each of a rank's tokens.

        A rank's tokens are its share of a micro-batch under context and sequence parallelism, rows * length / (context
        * tensor). Between the projections it works on `tensor` times as many tokens and 1/tensor of the heads, which
        comes to the same.
        """
        size = 4 if precision == "fp32" else 2
        tokens = size * self.hidden_size
        quantized = self.attention_inputs(layer) + self.mlp_inputs(layout, layer) if precision in EIGHT_BITS else 0
        return {
            "layer's input": tokens,
            "its norm, input of the projections": tokens,
            **self.attention_activations(layout, precision, rows, layer, fused),
            "input of the second half": tokens,
            "its norm": tokens,
            **self.mlp_activations(layout, size, layer, fused),
            # Negative: these inputs are counted above in the model's type, and kept in 8 bits.
            "inputs of matrices in 8 bits": -(size - EIGHT_BITS_BYTES) * quantized,
        }

    def layer_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """One of the parts at work.

        Beside attention, nothing of the second half is there: not yet in the forward pass, and no longer in the
        backward pass; it is counted without fusions.
        """
        size = 4 if precision == "fp32" else 2
        second_half = 2 * size * self.hidden_size + sum(self.mlp_activations(layout, size, layer, False).values())
        attention = self.attention_working_set(layout, precision, rows, layer) - second_half
        return max(self.mlp_working_set(layout, precision, layer), attention)
