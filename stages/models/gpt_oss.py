"""A mixture of experts of the GPT-OSS shape (arXiv:2508.10925). No torch here.

Layers with a sliding window and layers with full attention take turns, the first with a window. transformers loads its
export as GptOssForCausalLM.

Each head has a sink, a score of its own in the softmax, and all matrices but embeddings have biases. An expert computes
(up + 1) * gate * sigmoid(1.702 gate), with gate and up cut off at 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pipeline.core.bounds import Context
from stages.models.base import Precision, UntiedConfig
from stages.models.costs import AttentionCost, Rows, sliced_attention
from stages.models.grouped_query import GroupedQueryConfig, swiglu_shapes
from stages.models.mixture import RoutedConfig, sent_tokens
from stages.models.parallel_layout import Layout


class GptOssConfig(UntiedConfig, RoutedConfig, GroupedQueryConfig):
    """A mixture of experts with windows and sinks: `architecture: gpt_oss`."""

    spec_module: ClassVar[str] = "stages.mcore.architectures.gpt_oss"
    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = True
    architecture: Literal["gpt_oss"]
    """gpt_oss: a mixture of experts whose layers see a window and all tokens in turns"""
    sliding_window: Context
    """tokens that the first, third, ... layer sees, its own among them; the other layers see all"""

    def layout_obstacle(self, layout: Layout) -> str | None:
        if layout.split_experts == 1:
            return None
        field = f"tp = {layout.tp} without etp" if layout.etp is None else f"etp = {layout.etp}"
        return (
            f"parallelism.{field} splits experts, and Megatron-core splits none that have biases; "
            "set etp to 1 and ep to a multiple of tp"
        )

    def attention(self) -> list[AttentionCost]:
        (full,) = super().attention()
        counts = {self.sliding_window: -(-self.layers // 2), None: self.layers // 2}
        return [
            AttentionCost(layers, full.heads, full.qk, full.v, window, full.kv_heads)
            for window, layers in counts.items()
            if layers
        ]

    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        sinks, bias = {"core_attention.softmax_offset": (self.heads,)}, {"linear_proj.bias": (self.hidden_size,)}
        return super().attention_shapes(layer) | sinks | bias

    def attention_memory(self, layer: int) -> tuple[int, int]:
        whole, cut = super().attention_memory(layer)
        return whole + self.hidden_size, cut + self.heads

    def mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        hidden, ffn = self.hidden_size, self.moe_intermediate_size
        out: dict[str, tuple[int, ...]] = {"router.weight": (self.experts, hidden), "router.bias": (self.experts,)}
        for expert in range(self.experts):
            at = f"experts.local_experts.{expert}."
            out |= swiglu_shapes(hidden, ffn, at)
            out |= {f"{at}linear_fc1.bias": (2 * ffn,), f"{at}linear_fc2.bias": (hidden,)}
        return out

    @property
    def _expert(self) -> int:
        """Parameters of an expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size + 2 * self.moe_intermediate_size + self.hidden_size

    def mlp_parameters(self) -> tuple[int, int]:
        router = self.experts * (self.hidden_size + 1)
        total, active = (router + count * self._expert for count in (self.experts, self.num_experts_per_tok))
        return self.layers * total, self.layers * active

    def mlp_matrices(self) -> int:
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        return self.layers * (self.experts * self.hidden_size + self.num_experts_per_tok * expert)

    def mlp_memory(self, layout: Layout, layer: int) -> tuple[int, int, int]:
        """Router, and biases of what is summed over tensor ranks, are whole on each of them."""
        split, hidden = layout.split_experts, self.hidden_size
        expert = (self._expert - hidden) // split + hidden
        return self.experts * (hidden + 1), 0, self.experts // layout.ep * expert

    def attention_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool
    ) -> dict[str, float]:
        """Bytes by tensor that the attention of a layer keeps for each of the rank's tokens.

        PyTorch has no kernel with sinks for a GPU: there plain products keep the scores of every query, in fp32 and
        rounded, and the keys and values of each slice of queries for all heads. Transformer Engine has one for rows of
        one document; it is counted on if the precision or the layout needs it. fp32 is counted as on a CPU, whose
        kernel keeps none.
        """
        if precision == "fp32" or self.has_engine_attention(layout, precision, rows, fused):
            return super().attention_activations(layout, precision, rows, layer, fused)
        q = self.heads * self.head_dim
        scores, keys = sliced_attention(rows, None if layer % 2 else self.sliding_window)
        return {
            "queries, turned": 2 * q,
            "keys and values of each slice, for all heads": 2 * 2 * q * keys,
            "softmax of the scores and the sink, fp32, and rounded": self.heads * (4 * (scores + 1) + 2 * scores),
            "attention's output": 2 * q,
        }

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """The output of plain products, by slices and as a row."""
        if precision == "fp32" or self.has_engine_attention(layout, precision, rows, False):
            return super().attention_working_set(layout, precision, rows, layer)
        return 2 * self.heads * self.head_dim

    def masked_windows(
        self, layout: Layout, precision: Precision, rows: Rows, fused: bool = False
    ) -> tuple[int | None, ...]:
        return (
            ()
            if rows.targets is not None or self.has_engine_attention(layout, precision, rows, fused)
            else (self.sliding_window, None)
        )

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        copies, ffn = self.num_experts_per_tok, self.moe_intermediate_size
        return {
            # fp32 logits, their softmax for the balance loss, sparse probabilities, and the map of bytes
            "router": 13 * self.experts,
            "tokens sent to experts": size * self.hidden_size * copies * layout.split_experts,
            "experts' gate and up": 2 * size * ffn * copies,
            # unfused: gate and up cut off, a sigmoid and what it scales, the product, and the weighted one
            "experts' activation, and weighted": (1 if fused else 6) * size * ffn * copies,
            "experts' outputs, summed in one order": size * self.hidden_size * copies if layout.deterministic else 0,
        }

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        """Bytes that the feed-forward part of a layer has at one time beyond what it keeps, for each token of the rank.

        It is the larger of two states: tokens on their way to experts, and the backward pass. The latter has the
        gradients of what the experts return, and three tensors in fp32 of the weighted biases of one expert.
        """
        size, numbers = 4 if precision == "fp32" else 2, self.hidden_size * self.num_experts_per_tok
        local = self.experts // layout.ep
        sent = sent_tokens(self.hidden_size, self.num_experts_per_tok, layout, precision, alone=local == 1)
        copies = 2 if local > 1 else 1
        return max(sent, (size * copies + 3 * 4 / local) * numbers)

    def layer_moved(self, layout: Layout, precision: Precision, layer: int) -> float:
        """With what the experts' matrices return, the weighted biases, and their sum."""
        size, copies = 4 if precision == "fp32" else 2, self.hidden_size * self.num_experts_per_tok
        sent = sent_tokens(self.hidden_size, self.num_experts_per_tok, layout, precision, alone=False)
        return sent + 3 * size * copies

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), *self.expert_split_sizes()]

    def proportions(self) -> dict[str, float]:
        return {**super().proportions(), **self.expert_proportions()}

    def describe(self) -> str:
        window = f"in turns with a window of {self.sliding_window} tokens and without"
        return f"{super().describe()}, {window}, {self.describe_experts()}"

    def inner_widths(self) -> dict[str, int]:
        return {**super().inner_widths(), "expert": self.moe_intermediate_size}

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        """Few experts, and the same window."""
        changes = super().scaled(hidden_size, width)
        return changes and {**changes, **self.scaled_experts(width)}
