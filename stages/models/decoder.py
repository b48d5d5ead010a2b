"""Decoders whose layers are an attention and a feed-forward part, each behind a norm: their tensors and the costs of a
layer in closed form, from those of the two parts. No torch here.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from stages.mcore.parallel_layout import Layout
from stages.models.base import ModelConfig, Precision
from stages.models.costs import MemoryShare, Rows


class DecoderConfig(ModelConfig):
    """A decoder that states its attention and its feed-forward part."""

    # -- the attention of a layer -------------------------------------------------------------------------------------

    @abstractmethod
    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer's attention, by their names after `self_attention.`."""

    @abstractmethod
    def attention_memory(self, layer: int) -> tuple[int, int]:
        """(whole on each tensor rank, cut by tensor parallelism) parameters of a layer's attention; the second before
        it is cut."""

    @abstractmethod
    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        """Bytes by tensor that the attention of a layer keeps for each of the rank's tokens, without its input. fused:
        as in `layer_activations`."""

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
        """(whole on each tensor rank, cut by tensor parallelism, of experts on one rank) parameters of the feed-forward
        part of a layer; the second before it is cut."""

    @abstractmethod
    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        """Bytes by tensor that the feed-forward part of a layer keeps for each of the rank's tokens. size: bytes of a
        value."""

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
        attention = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
        return attention + self.mlp_matrices() + padded_vocab_size * self.hidden_size

    def layer_memory(self, layout: Layout, layer: int) -> MemoryShare:
        whole, cut = self.attention_memory(layer)
        mlp_whole, mlp_cut, experts = self.mlp_memory(layout, layer)
        return MemoryShare(2 * self.hidden_size + whole + mlp_whole + (cut + mlp_cut) // layout.tp, experts)

    def layer_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool = False
    ) -> dict[str, float]:
        """A rank's tokens are its share of a micro-batch under context and sequence parallelism, rows * length /
        (context * tensor). Between the projections it works on `tensor` times as many tokens and 1/tensor of the heads,
        which comes to the same."""
        size = 4 if precision == "fp32" else 2
        tokens = size * self.hidden_size
        return {
            "layer's input": tokens,
            "its norm, input of the projections": tokens,
            **self.attention_activations(layout, precision, rows, layer, fused),
            "input of the second half": tokens,
            "its norm": tokens,
            **self.mlp_activations(layout, size, layer, fused),
        }
