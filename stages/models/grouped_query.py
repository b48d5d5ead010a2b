"""Decoders with grouped-query attention and any feed-forward part; and the dense one of the Qwen3 shape.

No torch here. transformers loads the export of `qwen3` as Qwen3ForCausalLM.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from pipeline.core.bounds import Range
from stages.models.base import (
    AttentionCost,
    ModelConfig,
    Precision,
    Rows,
    Shapes,
    Width,
    bytes_of,
    has_engine_attention,
    keys_of_tokens,
)
from stages.models.parallel_layout import Layout

Heads = Annotated[int, Range(1, 1024, "DeepSeek-V3: 128")]


class GroupedQueryConfig(ModelConfig):
    """A decoder whose attention is grouped-query attention, as Qwen3's and Llama's."""

    heads: Heads
    """query heads"""
    kv_heads: Heads
    """key and value heads; must divide heads"""
    head_dim: Annotated[int, Range(1, 1024, "usual: 64 to 256")]
    """width of one head; must be even for the rotary embedding"""

    @model_validator(mode="after")
    def _possible_heads(self) -> GroupedQueryConfig:
        if self.heads % self.kv_heads:
            nearest = _nearest([n for n in range(1, self.heads + 1) if self.heads % n == 0], self.kv_heads)
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; nearest: {nearest}")
        if self.head_dim % 2:
            near = f"{self.head_dim - 1} or {self.head_dim + 1}" if self.head_dim > 1 else "2"
            raise ValueError(f"head_dim = {self.head_dim} is odd, but rotary embedding turns pairs; nearest: {near}")
        return self

    @property
    def qk_norm(self) -> bool:
        """True if each head's queries and keys are normalized."""
        return True

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return False

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    def attention_shapes(self) -> Shapes:
        """`linear_qkv` holds, for each key/value head, its query heads, its key and its value."""
        hidden, head = self.hidden_size, self.head_dim
        norms = {"q_layernorm.weight": (head,), "k_layernorm.weight": (head,)} if self.qk_norm else {}
        rows = (self.heads + 2 * self.kv_heads) * head
        return {
            "linear_qkv.weight": (rows, hidden),
            **({"linear_qkv.bias": (rows,)} if self.qkv_bias else {}),
            **norms,
            "linear_proj.weight": (hidden, self.heads * head),
        }

    def attention(self) -> AttentionCost:
        return AttentionCost(self.layers, self.heads, self.head_dim, self.head_dim)

    def cache_bytes(self, size: int, ranks: int, tokens: int) -> int:
        """Keys and values; ranks beyond the number of their heads hold copies."""
        heads = -(-self.kv_heads // ranks)
        return size * self.layers * heads * 2 * self.head_dim * tokens

    def _by_engine(self, layout: Layout, precision: Precision, rows: Rows, fused: bool) -> bool:
        """Returns True if attention is surely Transformer Engine's, which turns whole heads only."""
        return self.rotary_dim == self.head_dim and has_engine_attention(layout, precision, rows, fused)

    def attention_activations(self, layout: Layout, precision: Precision, rows: Rows, fused: bool) -> dict[str, float]:
        size = bytes_of(precision)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors: dict[str, float]
        if self._by_engine(layout, precision, rows, fused):
            tensors = {
                "queries, keys and values as projected": size * (q + 2 * kv),
                "queries and keys, normed and turned": size * (q + kv),
            }
        else:
            normed = q + kv + self.heads + self.kv_heads if self.qk_norm else 0
            tensors = {
                "queries and keys, normed, and 1/RMS, fp32": 4 * normed,
                "queries, keys (turned) and values": size * (q + 2 * kv * keys_of_tokens(layout, rows)),
                "attention's output by rows or documents": size * q * _copies_of_output(precision, rows),
            }
        return tensors | {"attention's output": size * q, "log-sum-exp of the scores": 4 * self.heads}

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens.

        They belong to the norms of queries and keys in the backward pass, or without norms to their rotation in the
        forward pass: some tensors in fp32 of the queries, beside these and what they are made of. The output is not
        there. Or, by slices of queries, they are gradients of keys and values in the backward pass, before and with
        those of a slice.
        """
        if self._by_engine(layout, precision, rows, False):
            return 0.0
        size = bytes_of(precision)
        converted = 0 if precision == "fp32" else 1  # tensors of queries that are there in fp32 as well
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        keys, projected = keys_of_tokens(layout, rows), size * (q + 2 * kv)
        kept = size * (q + 2 * kv * keys) + size * q * (1 + _copies_of_output(precision, rows))
        if self.qk_norm:
            heads: float = 4 * q * (2 + converted) + 2 * projected
        else:
            heads = 4 * q * (3 + converted) * self.rotary_dim / self.head_dim + projected
        return max(heads - kept, size * 4 * kv * keys if precision == "fp32" else 0.0)

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), ("tp", "heads", self.heads), ("tp", "kv_heads", self.kv_heads)]


class Qwen3Config(GroupedQueryConfig):
    """A dense decoder: `architecture: qwen3`."""

    architecture: Literal["qwen3"]
    """qwen3: a dense decoder"""
    intermediate_size: Width
    """inner width of the SwiGLU of each layer"""

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), ("tp", "intermediate_size", self.intermediate_size)]


def _copies_of_output(precision: Precision, rows: Rows) -> int:
    """Copies of the output of this project's attention.

    It computes rows side by side, and in fp32 by slices of queries or by documents of like length.
    """
    return int(rows.rows > 1 or precision == "fp32")


def _nearest(choices: list[int], value: int) -> str:
    """The choices just below and just above `value`, as words."""
    below = [n for n in choices if n < value][-1:]
    above = [n for n in choices if n > value][:1]
    return " or ".join(str(n) for n in below + above)
