"""Decoders with grouped-query attention and any feed-forward part: the settings and costs of the attention.

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import model_validator

from pipeline.core.bounds import Range
from stages.models.base import Precision
from stages.models.costs import AttentionCost, Rows
from stages.models.decoder import DecoderConfig
from stages.models.parallel_layout import Layout

Heads = Annotated[int, Range(1, 1024, "DeepSeek-V3: 128")]
RotaryPart = Annotated[float, Range(0, 1, "Qwen3-Next: 0.25, GLM-4.5: 0.5", above=True)]


class GroupedQueryConfig(DecoderConfig):
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

    # -- the interface of every architecture --------------------------------------------------------------------------

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
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

    def attention_memory(self, layer: int) -> tuple[int, int]:
        """Norms are whole on each tensor rank, matrices and biases are cut."""
        # Queries, keys and values; the output has none.
        biases = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        matrices = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return 2 * self.head_dim if self.qk_norm else 0, matrices + biases

    def attention(self) -> list[AttentionCost]:
        return [AttentionCost(self.layers, self.heads, self.head_dim, self.head_dim, kv_heads=self.kv_heads)]

    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        size = 4 if precision == "fp32" else 2
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors: dict[str, float]
        if self.has_engine_attention(layout, precision, rows, fused):
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

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens.

        They belong to the norms of queries and keys in the backward pass, or without norms to their rotation in the
        forward pass: some tensors in fp32 of the queries, beside these and what they are made of. The output is not
        there. Or, by slices of queries, they are gradients of keys and values in the backward pass, before and with
        those of a slice.
        """
        if self.has_engine_attention(layout, precision, rows, False):
            return 0.0
        size = 4 if precision == "fp32" else 2
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


class PartialRotaryConfig(GroupedQueryConfig):
    """Such a decoder of whose heads only a first part has rotary embedding."""

    partial_rotary_factor: RotaryPart
    """share of a head that has rotary embedding"""

    @model_validator(mode="after")
    def _possible_part(self) -> PartialRotaryConfig:
        turned = self.head_dim * self.partial_rotary_factor
        if turned != int(turned) or int(turned) % 2:
            nearest = max(2, 2 * round(turned / 2))
            raise ValueError(
                f"partial_rotary_factor = {self.partial_rotary_factor} gives {turned:g} of head_dim = {self.head_dim} "
                f"rotary embedding, which turns pairs; nearest: {nearest / self.head_dim:g}"
            )
        return self

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        """This project's attention computes rows of one document too (stages/mcore/layer_spec.py)."""
        return super().attention_activations(layout, precision, self._computed(rows), layer, fused)

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        return super().attention_working_set(layout, precision, self._computed(rows), layer)

    def _computed(self, rows: Rows) -> Rows:
        return replace(rows, packed=rows.packed or self.rotary_dim < self.head_dim)

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        """None too if the part cannot be divided into pairs."""
        changes = super().scaled(hidden_size, width)
        return None if changes is None or changes["head_dim"] * self.partial_rotary_factor % 2 else changes


def keys_of_tokens(layout: Layout, rows: Rows) -> float:
    """The keys that this project's attention keeps for each token: of all context ranks, and copies of a prefix."""
    return layout.cp + rows.prefixed / (rows.rows * rows.length)


def _copies_of_output(precision: Precision, rows: Rows) -> int:
    """Copies of the output of this project's attention.

    It computes rows side by side, and in fp32 by slices of queries or by documents of like length.
    """
    return int(rows.rows > 1 or precision == "fp32")


def swiglu_shapes(hidden: int, intermediate: int, at: str = "") -> dict[str, tuple[int, ...]]:
    """The two matrices of a SwiGLU, with names that start with `at`; `linear_fc1` holds gate above up."""
    return {f"{at}linear_fc1.weight": (2 * intermediate, hidden), f"{at}linear_fc2.weight": (hidden, intermediate)}


def swiglu_activations(size: int, intermediate: int, fused: bool) -> dict[str, float]:
    """Bytes that a SwiGLU keeps for each token.

    They are gate and up, and, unless it is one fused kernel, silu(gate), up, and their product.
    """
    return {"gate and up": 2 * size * intermediate, "SwiGLU": (1 if fused else 3) * size * intermediate}


def swiglu_gradients(hidden: int, intermediate: int, layout: Layout, precision: Precision) -> float:
    """Bytes of the gradients in the backward pass of a SwiGLU, for each token of a rank.

    At one time these are of its output, which skips it too, and gathered over tensor ranks, and of the product. Later
    they are of the product and its two factors, without the product.
    """
    size = 4 if precision == "fp32" else 2
    return size * (hidden + intermediate + max(intermediate, layout.tp * hidden if layout.tp > 1 else 0))


def _nearest(choices: list[int], value: int) -> str:
    """The choices just below and just above `value`, as words."""
    below = [n for n in choices if n < value][-1:]
    above = [n for n in choices if n > value][:1]
    return " or ".join(str(n) for n in below + above)
