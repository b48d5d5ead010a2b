"""Decoders with grouped-query attention and any feed-forward part: the settings of the attention, and the costs of a
layer in closed form. No torch here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from stages.mcore.parallel_layout import Layout
from stages.models.base import ModelConfig, Precision
from stages.models.costs import AttentionCost, MemoryShare, Rows

Heads = Annotated[int, Range(1, 1024, "DeepSeek-V3: 128")]
SLICE = 128
"""Queries in one call of attention on CPU (stages/mcore/row_tables.py)."""


class GroupedQueryConfig(ModelConfig):
    """A decoder whose attention is grouped-query attention, as Qwen3's and Llama's."""

    qk_norm: ClassVar[bool] = True
    """Whether each head's queries and keys are normalized."""

    heads: Heads = Field(description="query heads")
    kv_heads: Heads = Field(description="key and value heads; must divide heads")
    head_dim: Annotated[int, Range(1, 1024, "usual: 64 to 256")] = Field(
        description="width of one head; must be even for the rotary embedding"
    )

    @model_validator(mode="after")
    def _possible_heads(self) -> GroupedQueryConfig:
        if self.heads % self.kv_heads:
            nearest = _nearest([n for n in range(1, self.heads + 1) if self.heads % n == 0], self.kv_heads)
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; nearest: {nearest}")
        if self.head_dim % 2:
            near = f"{self.head_dim - 1} or {self.head_dim + 1}" if self.head_dim > 1 else "2"
            raise ValueError(f"head_dim = {self.head_dim} is odd, but rotary embedding turns pairs; nearest: {near}")
        return self

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

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    def shapes(self, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
        """`linear_qkv` holds, for each key/value head, its query heads, its key and its value; `linear_fc1` holds gate
        above up."""
        hidden, head = self.hidden_size, self.head_dim
        out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded_vocab_size, hidden)}
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            out[at + "input_layernorm.weight"] = (hidden,)
            out[at + "self_attention.linear_qkv.weight"] = ((self.heads + 2 * self.kv_heads) * head, hidden)
            if self.qk_norm:
                out[at + "self_attention.q_layernorm.weight"] = (head,)
                out[at + "self_attention.k_layernorm.weight"] = (head,)
            out[at + "self_attention.linear_proj.weight"] = (hidden, self.heads * head)
            out[at + "pre_mlp_layernorm.weight"] = (hidden,)
            out |= {f"{at}mlp.{name}": shape for name, shape in self.mlp_shapes(layer).items()}
        out["decoder.final_layernorm.weight"] = (hidden,)
        if not self.tie_embeddings:
            out["output_layer.weight"] = (padded_vocab_size, hidden)
        return out

    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        hidden = self.hidden_size
        embedding = padded_vocab_size * hidden
        layer = self._attention_matrices + self._norms
        rest = embedding * (1 if self.tie_embeddings else 2) + hidden + self.layers * layer
        total, active = self.mlp_parameters()
        return {"total": rest + total, "active": rest + active, "embedding": embedding}

    def matrices(self, padded_vocab_size: int) -> int:
        return self.layers * self._attention_matrices + self.mlp_matrices() + padded_vocab_size * self.hidden_size

    @property
    def _norms(self) -> int:
        return 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm

    @property
    def _attention_matrices(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)

    def attention(self) -> list[AttentionCost]:
        return [AttentionCost(self.layers, self.heads, self.head_dim, self.head_dim, kv_heads=self.kv_heads)]

    def layer_memory(self, layout: Layout, layer: int) -> MemoryShare:
        """Norms are whole on each tensor rank, matrices are cut."""
        replicated, cut, experts = self.mlp_memory(layout, layer)
        replicated += self._norms
        return MemoryShare(replicated + (self._attention_matrices + cut) // layout.tp, experts)

    def layer_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool = False
    ) -> dict[str, float]:
        """A rank's tokens are its share of a micro-batch under context and sequence parallelism, rows * length /
        (context * tensor). Between the projections it works on `tensor` times as many tokens and 1/tensor of the heads,
        which comes to the same."""
        size = 4 if precision == "fp32" else 2
        hidden, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors: dict[str, float] = {"layer's input": size * hidden, "its norm, input of the projection": size * hidden}
        if rows.packed:
            keys = layout.cp + rows.prefixed / (rows.rows * rows.length)  # for each token
            # fp32 has no kernel for rows of several documents on a GPU: documents of like length are a batch
            copies = (rows.rows > 1) + (rows.targets is not None and precision == "fp32")
            tensors |= {
                "queries and keys, normed, and 1/RMS, fp32": 4 * (q + kv + self.heads + self.kv_heads) * self.qk_norm,
                "queries, keys (turned) and values": size * (q + 2 * kv * keys),  # gathered over context ranks
                "attention's output by rows or documents": size * q * copies,
            }
        else:
            tensors |= {
                "queries, keys and values as projected": size * (q + 2 * kv),
                "queries and keys, normed and turned": size * (q + kv),
            }
        tensors |= {
            "attention's output": size * q,
            "log-sum-exp of the scores": 4 * self.heads,
            "input of the second half": size * hidden,
            "its norm": size * hidden,
        }
        return tensors | self.mlp_activations(layout, size, layer, fused)

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [("tp", "heads", self.heads), ("tp", "kv_heads", self.kv_heads)]

    def proportions(self) -> dict[str, float]:
        return {"query heads / key heads": self.heads / self.kv_heads}

    def describe(self) -> str:
        return (
            f"{self.layers} layers, hidden size {self.hidden_size}, {self.heads} query and {self.kv_heads} key heads "
            f"of {self.head_dim}"
        )

    def inner_widths(self) -> dict[str, int]:
        return {"attention": self.heads * self.head_dim}

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        """Heads keep their groups; None if the attention cannot be divided into such heads."""
        attention, group = width(self.heads * self.head_dim), self.heads // self.kv_heads
        choices = [n for n in range(1, self.kv_heads + 1) if attention % (2 * n * group) == 0]
        if not choices:
            return None
        kv_heads = min(choices, key=lambda n: abs(attention / (n * group) - self.head_dim))
        return {
            "hidden_size": hidden_size,
            "heads": kv_heads * group,
            "kv_heads": kv_heads,
            "head_dim": attention // (kv_heads * group),
        }


def swiglu_shapes(hidden: int, intermediate: int, at: str = "") -> dict[str, tuple[int, ...]]:
    """The two matrices of a SwiGLU, with names that start with `at`."""
    return {f"{at}linear_fc1.weight": (2 * intermediate, hidden), f"{at}linear_fc2.weight": (hidden, intermediate)}


def swiglu_activations(size: int, intermediate: int, fused: bool) -> dict[str, float]:
    """Bytes that a SwiGLU keeps for each token: gate and up, and, unless it is one fused kernel, silu(gate), up, and
    their product."""
    return {"gate and up": 2 * size * intermediate, "SwiGLU": (1 if fused else 3) * size * intermediate}


def _nearest(choices: list[int], value: int) -> str:
    """The choices just below and just above `value`, as words."""
    below = [n for n in choices if n < value][-1:]
    above = [n for n in choices if n > value][:1]
    return " or ".join(str(n) for n in below + above)
