"""A hybrid of linear and full attention of the Qwen3-Next shape, with experts in each layer.

Most layers are gated delta nets (Yang et al., 2024, arXiv:2412.06464), every few layers a gated attention instead. Each
layer's experts have a shared one.

A gated delta net keeps a state of fixed size where attention keeps the keys and values of all tokens. No torch here:
`atom plan` reads this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from pipeline.core.bounds import Range
from stages.models.base import Layers, Precision, UntiedConfig, Width
from stages.models.costs import AttentionCost, Rows, StateCost
from stages.models.grouped_query import Heads, PartialRotaryConfig, RotaryPart
from stages.models.parallel_layout import Layout
from stages.models.qwen3_moe import Qwen3MoeConfig

HeadWidth = Annotated[int, Range(1, 1024, "Qwen3-Next: 128")]
CHUNK = 64
"""Tokens that the delta rule computes together."""
STATE_BYTES = 4
"""Bytes of a number in the state of a layer while it generates, which is fp32."""


class Qwen3NextConfig(UntiedConfig, Qwen3MoeConfig, PartialRotaryConfig):
    """Linear attention with a gated attention every few layers: `architecture: qwen3_next`."""

    spec_module: ClassVar[str] = "stages.mcore.architectures.qwen3_next"
    zero_centered_norms: ClassVar[bool] = True
    architecture: Literal["qwen3_next"]  # type: ignore[assignment]
    """qwen3_next: gated delta nets and gated attention, with experts"""
    shared_expert_intermediate_size: Width
    """inner width of the shared expert, which has a gate"""
    full_attention_interval: Layers = 4
    """every layer whose number this divides has full attention, the others are gated delta nets"""
    partial_rotary_factor: RotaryPart = 0.25
    """share of a head of full attention that has rotary embedding"""
    linear_num_key_heads: Heads
    """query and key heads of a gated delta net"""
    linear_num_value_heads: Heads
    """value heads of a gated delta net; a multiple of linear_num_key_heads"""
    linear_key_head_dim: HeadWidth
    """width of a query or key head of a gated delta net"""
    linear_value_head_dim: HeadWidth
    """width of a value head of a gated delta net"""
    linear_conv_kernel_dim: Annotated[int, Range(2, 64, "Qwen3-Next: 4")] = 4
    """tokens of the short convolution of a gated delta net"""

    @model_validator(mode="after")
    def _possible_hybrid(self) -> Qwen3NextConfig:
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        if values % keys:
            below, above = max(1, values // keys) * keys, -(-values // keys) * keys
            near = str(above) if below == above else f"{below} or {above}"
            raise ValueError(
                f"linear_num_value_heads = {values} is no multiple of linear_num_key_heads = {keys}; nearest: {near}"
            )
        return self

    # -- the two kinds of layers --------------------------------------------------------------------------------------

    def is_linear(self, layer: int) -> bool:
        """Returns True if a layer, from 0, is a gated delta net."""
        return (layer + 1) % self.full_attention_interval > 0

    @property
    def linear_layers(self) -> int:
        return self.layers - self.layers // self.full_attention_interval

    @property
    def key_width(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    # -- the feed-forward part: experts, and a shared one with a gate -------------------------------------------------

    def mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes = super().mlp_shapes(layer)
        return shapes if layer < self.dense_layers else shapes | {"shared_experts.gate_weight": (1, self.hidden_size)}

    @property
    def _gates(self) -> int:
        return (self.layers - self.dense_layers) * self.hidden_size

    def mlp_parameters(self) -> tuple[int, int]:
        total, active = super().mlp_parameters()
        return total + self._gates, active + self._gates

    def mlp_matrices(self) -> int:
        return super().mlp_matrices() + self._gates

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        tensors = super().mlp_activations(layout, size, layer, fused)
        if layer >= self.dense_layers:
            tensors["shared expert's output, before its gate"] = size * self.hidden_size
        return tensors

    def mlp_memory(self, layout: Layout, layer: int) -> tuple[int, int, int]:
        whole, cut, experts = super().mlp_memory(layout, layer)
        gate = self.hidden_size if layer >= self.dense_layers else 0
        return whole + gate, cut, experts

    # -- the interface of every architecture --------------------------------------------------------------------------

    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Rows are in the order of heads, so that tensor parallelism cuts them anywhere between key heads.

        `linear_qkv` holds, for each key and value head, its queries, their gates, its key and its value. `in_proj`
        holds, for each key head, its query, its key, and of all its value heads the value, the output gate, the rate
        and the decay; `conv1d` the channels of queries, keys and values in the same order.
        """
        keys, values, heads = self.key_width, self.value_width, self.linear_num_value_heads
        hidden = self.hidden_size
        if self.is_linear(layer):
            return {
                "in_proj.weight": (2 * keys + 2 * values + 2 * heads, hidden),
                "conv1d.weight": (2 * keys + values, 1, self.linear_conv_kernel_dim),
                "dt_bias": (heads,),
                "A_log": (heads,),
                "out_norm.weight": (self.linear_value_head_dim,),
                "out_proj.weight": (hidden, values),
            }
        return {
            "linear_qkv.weight": (2 * (self.heads + self.kv_heads) * self.head_dim, hidden),
            "q_layernorm.weight": (self.head_dim,),
            "k_layernorm.weight": (self.head_dim,),
            "linear_proj.weight": (hidden, self.heads * self.head_dim),
        }

    def attention_memory(self, layer: int) -> tuple[int, int]:
        """Norms are whole on each tensor rank, the other tensors are cut."""
        sizes = {name: math.prod(shape) for name, shape in self.attention_shapes(layer).items()}
        whole = sum(size for name, size in sizes.items() if "norm" in name)
        return whole, sum(sizes.values()) - whole

    def attention(self) -> list[AttentionCost]:
        full = AttentionCost(
            self.layers - self.linear_layers, self.heads, self.head_dim, self.head_dim, kv_heads=self.kv_heads
        )
        return [
            full,
            StateCost(
                self.linear_layers,
                self.linear_num_value_heads,
                self.linear_key_head_dim,
                self.linear_value_head_dim,
                kv_heads=self.linear_num_key_heads,
            ),
        ]

    def full_attention(self) -> list[AttentionCost]:
        return [AttentionCost(self.layers, self.heads, self.head_dim, self.head_dim, kv_heads=self.kv_heads)]

    def cache_bytes(self, size: int, ranks: int, tokens: int) -> int:
        """A gated delta net keeps its state and the latest inputs of its convolution, however long the text is."""
        heads = -(-self.linear_num_value_heads // ranks)
        # S [key, value] of each value head.
        state = STATE_BYTES * heads * self.linear_key_head_dim * self.linear_value_head_dim
        channels = 2 * self.key_width + self.value_width
        inputs = size * (self.linear_conv_kernel_dim - 1) * -(-channels // ranks)
        return super().cache_bytes(size, ranks, tokens) + self.linear_layers * (state + inputs)

    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        """As this project's PyTorch code keeps them: the delta rule in fp32, by chunks.

        A kernel written for it keeps much less.
        """
        size = 4 if precision == "fp32" else 2
        return (
            self._delta_activations(size, rows) if self.is_linear(layer) else self._gated_activations(size, layout.cp)
        )

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens.

        A gated attention has gradients of its gates in the backward pass, and a delta net has what its chunks of the
        forward pass are made of, as simulated ranks show. The output is not there.
        """
        is_narrow = precision != "fp32"
        if not self.is_linear(layer):
            q = self.heads * self.head_dim
            return 4 * q * 3 - 2 * q if is_narrow else 4 * q * 2
        heads, key, value = self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
        chunks, outputs = (6, 1) if is_narrow else (10, 2)
        converted = 2 * key if is_narrow else 0
        return 4 * (heads * (converted + chunks * CHUNK - outputs * value) + 2 * self.key_width)

    def _gated_activations(self, size: int, cp: int) -> dict[str, float]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "queries, keys, values and gates as projected": size * (2 * q + 2 * kv),
            "queries and keys, normed and turned": size * (q + kv),
            "attention's output by slices, as a row, and gated": size * 3 * q,
            "keys and values of other context ranks": size * 2 * kv * (cp - 1),
            "gates": 4 * q,
            "log-sum-exp of the scores": 4 * self.heads,
        }

    def _delta_activations(self, size: int, rows: Rows) -> dict[str, float]:
        values, heads = self.value_width, self.linear_num_value_heads
        key, value = self.linear_key_head_dim, self.linear_value_head_dim
        copies = 2
        if rows.packed:
            # In packed rows the convolution is a sum over its width, of which each term keeps a copy.
            copies = self.linear_conv_kernel_dim + (2 if rows.prefixed else 1)
        with_prefixes = {
            "the convolution's inputs": size * (2 * self.key_width + values) * copies,
            "queries and keys before they have length 1, fp32": 4 * (2 * self.key_width + (values if size == 4 else 0)),
            "queries and keys, for each value head": 4 * heads * 10 * key,
            "products within a chunk": 4 * heads * 6 * CHUNK,
            "values, read and written": 4 * heads * 3 * value,
            "states between chunks": 4 * heads * key * value / CHUNK,
            "rates and decays": 4 * heads * 8,
        }
        tokens = 1 + rows.prefixed / (rows.rows * rows.length)  # each document runs after a copy of its prefix
        return {name: tokens * count for name, count in with_prefixes.items()} | {
            "output, normed and gated": size * 3 * values,
            "output gates, fp32": 4 * 2 * values,
        }

    def layout_obstacle(self, layout: Layout) -> str | None:
        if layout.cp > 1 and self.linear_layers:
            return (
                f"parallelism.cp = {layout.cp} divides rows, and the state of a gated delta net passes through a whole "
                "row; leave it out"
            )
        return super().layout_obstacle(layout)

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), ("tp", "linear_num_key_heads", self.linear_num_key_heads)]

    def proportions(self) -> dict[str, float]:
        linear = self.linear_num_value_heads / self.linear_num_key_heads
        return {**super().proportions(), "value heads / key heads of linear attention": linear}

    def describe(self) -> str:
        return (
            f"{super().describe()}; {self.linear_layers} layers are gated delta nets of {self.linear_num_key_heads} "
            f"key heads of {self.linear_key_head_dim} and {self.linear_num_value_heads} value heads of "
            f"{self.linear_value_head_dim}"
        )

    def inner_widths(self) -> dict[str, int]:
        widths = super().inner_widths()
        return {**widths, "keys of linear attention": self.key_width, "values of linear attention": self.value_width}

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        """Heads of linear attention keep their groups too; None if its widths cannot be divided so.

        One layer in two has full attention, since a proxy has few.
        """
        changes = super().scaled(hidden_size, width)
        if changes is None:
            return None
        # Scaled as sums over heads, and divided into heads below.
        keys, values = width(self.key_width), width(self.value_width)
        group = self.linear_num_value_heads // self.linear_num_key_heads
        choices = [n for n in range(1, self.linear_num_key_heads + 1) if not keys % n and not values % (n * group)]
        if not choices:
            return None
        heads = min(choices, key=lambda n: abs(keys / n - self.linear_key_head_dim))
        return {
            **changes,
            "full_attention_interval": min(self.full_attention_interval, 2),
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads * group,
            "linear_key_head_dim": keys // heads,
            "linear_value_head_dim": values // (heads * group),
        }

    def export_obstacle(self) -> str | None:
        if not self.router_bias_update_rate:
            return None
        return (
            f"model.router_bias_update_rate = {self.router_bias_update_rate} cannot be exported: "
            "Qwen3NextForCausalLM, which transformers and others load unchanged, has no bias of experts and no sigmoid "
            "scores; leave it out, or stop before the export"
        )
