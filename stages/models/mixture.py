"""A mixture of experts as the feed-forward part of a layer, for decoders with any attention. No torch here.

This module has its settings, and its costs in closed form.

A token visits `num_experts_per_tok` of the SwiGLUs that are the experts of a layer. All tokens visit the shared ones if
there are some, and the first `dense_layers` have one SwiGLU instead.

Two architectures join it with grouped-query attention. Qwen3-MoE normalizes queries and keys. In GLM-4.5
(arXiv:2508.06471) experts are those of DeepSeek-V3, without multi-token prediction, a part of each head has rotary
embedding, and queries, keys and values may have biases, queries and keys a norm. transformers loads their exports as
Qwen3MoeForCausalLM and Glm4MoeForCausalLM.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from pipeline.core.bounds import Flag, Range
from pipeline.core.stage import added
from stages.models.base import (
    EXPERT,
    LossWeight,
    ModelConfig,
    Precision,
    Routing,
    Shapes,
    Width,
    bytes_of,
    swiglu_shapes,
)
from stages.models.grouped_query import GroupedQueryConfig
from stages.models.parallel_layout import Layout, Module

Experts = Annotated[int, Range(1, 4096, "Kimi K2: 384, Switch-C: 2048")]
"""A number of experts, or of groups of them."""
BEST = 2
"""A group of experts is scored by the sum of the scores of this many best ones (DeepSeek-V3, section 2.1.2)."""


class MixtureConfig(ModelConfig):
    """A decoder whose layers have SwiGLUs as experts.

    It stands left of the class of the attention among the bases of an architecture: its methods continue those.
    """

    experts: Experts
    """experts in each layer"""
    num_experts_per_tok: Experts
    """experts to which each token is routed (top-k)"""
    moe_intermediate_size: Width
    """inner width of one expert"""
    aux_loss: LossWeight = 1e-3
    """weight of the load-balancing loss, summed over layers as in Megatron-Core"""
    balance: Literal["batch", "sequence", "global"] = added("batch")
    """tokens over which aux_loss balances experts: those of a micro-batch, of each row, or of a whole step"""
    z_loss: LossWeight = added(0.0)
    """weight of the router z-loss (ST-MoE), the squared log-sum-exp of its logits; 0: off"""
    dense_layers: Annotated[int, Range(0, 1023)] = added(0)
    """number of first layers with a dense SwiGLU instead of experts"""
    intermediate_size: Width | None = added(None)
    """inner width of the SwiGLU in dense layers"""

    @model_validator(mode="after")
    def _possible_choice(self) -> MixtureConfig:
        """A token can be routed to its number of experts, and the router can learn."""
        experts, top_k = self.experts, self.num_experts_per_tok
        if top_k == 1:
            raise ValueError(
                "num_experts_per_tok = 1 gives the router no gradient from the loss, since the one weight is always 1; "
                "nearest: 2"
            )
        if top_k > experts:
            raise ValueError(
                f"num_experts_per_tok = {top_k} is more than experts = {experts}; "
                f"nearest: num_experts_per_tok {experts} or experts {top_k}"
            )
        return self

    @model_validator(mode="after")
    def _possible_layers(self) -> MixtureConfig:
        if self.dense_layers >= self.layers:
            raise ValueError(
                f"dense_layers = {self.dense_layers} leaves no layer of {self.layers} with experts; "
                f"use at most {self.layers - 1}"
            )
        if bool(self.dense_layers) != bool(self.intermediate_size):
            raise ValueError(
                f"dense_layers = {self.dense_layers} and intermediate_size = {self.intermediate_size} go "
                "together; set both or neither"
            )
        return self

    has_expert_bias: ClassVar[bool] = False
    """True if each expert has a bias by which it is chosen."""

    @property
    def shared_width(self) -> int:
        """Inner width of the experts that every token uses, side by side; 0 without them."""
        return 0

    @property
    def routing(self) -> Routing:
        layers, is_global = range(self.dense_layers, self.layers), self.balance == "global"
        return Routing(self.experts, self.num_experts_per_tok, layers, self.z_loss > 0, is_global)

    def mlp_shapes(self, layer: int) -> Shapes:
        hidden = self.hidden_size
        if layer < self.dense_layers:
            return super().mlp_shapes(layer)
        out: Shapes = {"router.weight": (self.experts, hidden)}
        if self.has_expert_bias:
            out["router.expert_bias"] = (self.experts,)
        if self.shared_width:
            out |= swiglu_shapes(hidden, self.shared_width, "shared_experts.")
        return out | swiglu_shapes(hidden, self.moe_intermediate_size, EXPERT)

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        if layer < self.dense_layers:
            return super().mlp_activations(layout, size, layer, fused)
        copies, ffn = self.num_experts_per_tok, self.moe_intermediate_size
        # Tensors of the width of an expert that its SwiGLU keeps; unfused, its weighted product is one more.
        swiglu = 1 if fused else 3
        swiglu_and_weighted = 1 if fused else 4
        return {
            # fp32 logits, their softmax for the balance loss, sparse probabilities, and the map of bytes
            "router": 13 * self.experts,
            "tokens sent to experts": size * self.hidden_size * copies * layout.split_experts,
            "experts' gate and up": 2 * size * ffn * copies,
            "experts' SwiGLU, and weighted": swiglu_and_weighted * size * ffn * copies,
            "shared expert": (2 + swiglu) * size * self.shared_width,
            "experts' outputs, summed in one order": size * self.hidden_size * copies if layout.deterministic else 0,
        }

    def mlp_recomputed(self, modules: Collection[Module], layer: int) -> Collection[str]:
        if layer < self.dense_layers:
            return super().mlp_recomputed(modules, layer)
        names: dict[Module, str] = {"moe_act": "experts' SwiGLU, and weighted", "shared_experts": "shared expert"}
        return [names[module] for module in modules if module in names]

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        """Returns the larger of two states: tokens on their way to experts, and the backward pass of an expert.

        The latter has the gradients of the experts' outputs and of the layer's, and of one expert three tensors in fp32
        for its weighted product, which is gone: in bf16 its gradient makes up for that.
        """
        if layer < self.dense_layers:
            return super().mlp_working_set(layout, precision, layer)
        hidden, top_k, local = self.hidden_size, self.num_experts_per_tok, self.experts // layout.ep
        size, weighted = (4, 2 * 4) if precision == "fp32" else (2, 3 * 4)
        outputs = size * (top_k * layout.split_experts + 1) * hidden
        return max(
            sent_tokens(hidden, top_k, layout, precision, alone=local == 1),
            outputs + weighted * self.moe_intermediate_size * top_k / local,
        )

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [
            *super().split_sizes(),
            ("etp", "moe_intermediate_size", self.moe_intermediate_size),
            ("tp", "intermediate_size", self.intermediate_size or 0),
            ("tp", "width of shared experts", self.shared_width),
            ("ep", "experts", self.experts),
        ]


class SigmoidMixtureConfig(MixtureConfig):
    """A decoder whose layers have SwiGLUs as experts, scored by sigmoids with a bias for each (DeepSeek-V3)."""

    has_expert_bias: ClassVar[bool] = True
    router_bias_update_rate: Annotated[float, Range(0, 1, "DeepSeek-V3: 0.001")] = 1e-3
    """change of an expert's bias per step in auxiliary-loss-free balancing; 0: biases stay zero"""
    n_shared_experts: Annotated[int, Range(1, 64, "DeepSeek-V3: 1, Moonlight: 2")] = 1
    """experts that every token uses"""
    n_group: Experts = 1
    """groups of the experts of a layer; 1: no groups"""
    topk_group: Experts = 1
    """groups from which the experts of a token are chosen"""
    routed_scaling_factor: Annotated[float, Range(0, 100, "DeepSeek-V3: 2.5, Kimi K2: 2.827", above=True)] = 1.0
    """factor of the sum of the routed experts, whose weights sum to 1"""

    @model_validator(mode="after")
    def _possible_groups(self) -> SigmoidMixtureConfig:
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} is more than n_group = {self.n_group}; lower it")
        if self.experts % self.n_group or self.experts // self.n_group < BEST:
            divisors = [n for n in range(1, self.experts // BEST + 1) if self.experts % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_group), default=1)
            raise ValueError(
                f"n_group = {self.n_group} does not divide experts = {self.experts} into groups of at least {BEST}; "
                f"nearest: {nearest}"
            )
        if self.n_group > 1 and self.num_experts_per_tok // self.topk_group != BEST:
            raise ValueError(
                f"topk_group = {self.topk_group} does not fit num_experts_per_tok = {self.num_experts_per_tok}: "
                f"Megatron-Core scores a group by its num_experts_per_tok / topk_group best experts, and transformers "
                f"by its {BEST} best; use topk_group = {max(1, self.num_experts_per_tok // BEST)}, or n_group = 1"
            )
        if self.num_experts_per_tok > self.topk_group * self.experts // self.n_group:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than the experts of topk_group = "
                f"{self.topk_group} groups of {self.experts // self.n_group}; raise topk_group or lower n_group"
            )
        return self

    @property
    def shared_width(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


class Qwen3MoeConfig(MixtureConfig, GroupedQueryConfig):
    """A mixture of experts: `architecture: qwen3_moe`, the default of a section without this setting."""

    architecture: Literal["qwen3_moe"] = added("qwen3_moe")
    """qwen3_moe: a mixture of experts"""


class Glm4MoeConfig(SigmoidMixtureConfig, GroupedQueryConfig):
    """A mixture of experts with shared ones and partial rotary embedding: `architecture: glm4_moe`."""

    tie_embeddings: Flag = False
    """always false: vLLM's class of the architecture has a head of its own"""
    architecture: Literal["glm4_moe"]
    """glm4_moe: a mixture of experts with shared ones, chosen by sigmoids, and grouped-query attention"""
    partial_rotary_factor: Annotated[float, Range(0, 1, "GLM-4.5: 0.5", above=True)] = 0.5
    """share of a head that has rotary embedding"""
    attention_bias: Flag = True
    """biases of queries, keys and values"""
    use_qk_norm: Flag = False
    """normalize each head's queries and keys"""

    @model_validator(mode="after")
    def _possible_head(self) -> Glm4MoeConfig:
        if self.tie_embeddings:
            raise ValueError(
                f"tie_embeddings = true leaves vLLM's class of the architecture {self.architecture} without an output "
                "head; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _possible_part(self) -> Glm4MoeConfig:
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

    @property
    def qk_norm(self) -> bool:
        return self.use_qk_norm

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias


def sent_tokens(hidden_size: int, top_k: int, layout: Layout, precision: Precision, alone: bool) -> float:
    """Returns the bytes of tokens on their way to experts and back, for each of a rank's tokens.

    They are counted as sorted for the ranks that have them, as received, as the experts return them and as sorted back.
    With all experts on one rank these are what each expert returns, and that side by side. Ranks that split experts sum
    what these return, below fp32 after another copy in fp32, and have their part of the sum.

    `alone` means that a rank has one expert, for which nothing is sorted: it gets what is received, and returns what is
    sent.
    """
    size = bytes_of(precision)
    split = layout.split_experts
    # Numbers of a token's copies for the experts that it visits.
    copies = hidden_size * top_k
    in_fp32 = 0 if precision == "fp32" else 4  # bytes of a copy in fp32 of what is summed
    if layout.ep * split == 1:
        return 2 * size * copies
    if split == 1:
        return (3 if alone else 4) * size * copies
    # Ranks that split experts sum their outputs, below fp32 after a copy in fp32.
    sent = 2 if layout.ep > 1 else 1
    returned = (1 if alone else 2) * split
    return ((sent + returned) * size + in_fp32 * split + 4) * copies
