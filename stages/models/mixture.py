"""A mixture of experts as the feed-forward part of a layer, for decoders with any attention. No torch here.

This module has its settings, and its costs in closed form.

A token visits `num_experts_per_tok` of the experts of a layer. Of `MixtureConfig` these are SwiGLUs, all tokens visit
the shared ones if there are some, and the first `dense_layers` have one SwiGLU instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import model_validator

from pipeline.core.bounds import Range
from pipeline.core.stage import added
from stages.models.base import LossWeight, Precision, Routing, Width
from stages.models.decoder import DecoderConfig
from stages.models.grouped_query import GroupedQueryConfig, swiglu_activations, swiglu_gradients, swiglu_shapes
from stages.models.parallel_layout import Layout

Experts = Annotated[int, Range(1, 4096, "Kimi K2: 384, Switch-C: 2048")]
"""A number of experts, or of groups of them."""
PROXY_EXPERTS = 32
"""Maximum experts of a small proxy."""
BEST = 2
"""A group of experts is scored by the sum of the scores of this many best ones (DeepSeek-V3, section 2.1.2)."""


class RoutedConfig(DecoderConfig):
    """A decoder whose layers have experts of any kind.

    An architecture derives its config from this class and states its attention and its experts, and joins the two
    in the methods of every config.
    """

    experts: Experts
    """experts in each layer"""
    num_experts_per_tok: Experts
    """experts to which each token is routed (top-k)"""
    moe_intermediate_size: Width
    """inner width of one expert"""
    aux_loss: LossWeight = 1e-3
    """weight of the load-balancing loss, summed over layers as in Megatron-Core"""
    balance: Literal["batch", "sequence"] = added("batch")
    """tokens over which aux_loss balances experts: those of a micro-batch or of each row"""
    z_loss: LossWeight = added(0.0)
    """weight of the router z-loss (ST-MoE), the squared log-sum-exp of its logits; 0: off"""

    @model_validator(mode="after")
    def _possible_choice(self) -> RoutedConfig:
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

    @property
    def routing(self) -> Routing:
        return Routing(self.experts, self.num_experts_per_tok, range(self.layers), self.z_loss > 0)

    def expert_split_sizes(self) -> list[tuple[str, str, int]]:
        """As `split_sizes`, of the feed-forward parts."""
        return [("etp", "moe_intermediate_size", self.moe_intermediate_size), ("ep", "experts", self.experts)]

    def expert_proportions(self) -> dict[str, float]:
        """As `proportions`, of the feed-forward parts."""
        return {"experts / experts a token visits": self.experts / self.num_experts_per_tok}

    def describe_experts(self) -> str:
        """As `describe`, of the feed-forward parts."""
        return (
            f"{self.experts} experts of {self.moe_intermediate_size}, of which a token visits "
            f"{self.num_experts_per_tok}"
        )

    def scaled_experts(self, width: Callable[[int], int]) -> dict[str, Any]:
        """As `scaled`, of the feed-forward parts: at most PROXY_EXPERTS experts."""
        experts, top_k = proxy_experts(self.experts, self.num_experts_per_tok)
        inner = width(self.moe_intermediate_size)
        return {"experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": inner}


class MixtureConfig(RoutedConfig):
    """A decoder whose layers have SwiGLUs as experts."""

    router_bias_update_rate: Annotated[float, Range(0, 1, "DeepSeek-V3: 0.001")] = added(0.0)
    """change of an expert's bias per step in auxiliary-loss-free balancing; 0: off"""
    dense_layers: Annotated[int, Range(0, 1023)] = added(0)
    """number of first layers with a dense SwiGLU instead of experts"""
    intermediate_size: Width | None = added(None)
    """inner width of the SwiGLU in dense layers"""

    @property
    def shared_width(self) -> int:
        """Inner width of the experts that every token uses, side by side; 0 without them."""
        return 0

    @property
    def has_expert_bias(self) -> bool:
        """True if each expert has a bias by which it is chosen."""
        return self.router_bias_update_rate > 0

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

    @property
    def routing(self) -> Routing:
        return Routing(self.experts, self.num_experts_per_tok, range(self.dense_layers, self.layers), self.z_loss > 0)

    def mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        if layer < self.dense_layers:
            return swiglu_shapes(hidden, self.intermediate_size or 0)
        out: dict[str, tuple[int, ...]] = {"router.weight": (self.experts, hidden)}
        if self.has_expert_bias:
            out["router.expert_bias"] = (self.experts,)
        if self.shared_width:
            out |= swiglu_shapes(hidden, self.shared_width, "shared_experts.")
        for expert in range(self.experts):
            out |= swiglu_shapes(hidden, self.moe_intermediate_size, f"experts.local_experts.{expert}.")
        return out

    def mlp_parameters(self) -> tuple[int, int]:
        hidden, sparse = self.hidden_size, self.layers - self.dense_layers
        router = self.experts * (hidden + 1 if self.has_expert_bias else hidden)
        shared = 3 * hidden * self.shared_width
        dense = self.dense_layers * 3 * hidden * (self.intermediate_size or 0)
        rest = dense + sparse * (router + shared)
        # Gate, up and down: three matrices.
        expert = 3 * hidden * self.moe_intermediate_size
        return rest + sparse * self.experts * expert, rest + sparse * self.num_experts_per_tok * expert

    def mlp_matrices(self) -> int:
        hidden, sparse = self.hidden_size, self.layers - self.dense_layers
        router = self.experts * hidden
        visited = 3 * hidden * (self.num_experts_per_tok * self.moe_intermediate_size + self.shared_width)
        dense = 3 * hidden * (self.intermediate_size or 0)
        return sparse * (router + visited) + self.dense_layers * dense

    def mlp_memory(self, layout: Layout, layer: int) -> tuple[int, int, int]:
        """Parameters as in `Decoder.mlp_memory`; routers are whole on each tensor rank.

        Biases of experts are no parameters: a few kilobytes.
        """
        hidden = self.hidden_size
        if layer < self.dense_layers:
            return 0, 3 * hidden * (self.intermediate_size or 0), 0
        experts = self.experts // layout.ep * 3 * hidden * self.moe_intermediate_size // layout.split_experts
        return self.experts * hidden, 3 * hidden * self.shared_width, experts

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        if layer < self.dense_layers:
            return swiglu_activations(size, self.intermediate_size or 0, fused)
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

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        """Returns the larger of two states: tokens on their way to experts, and the backward pass of an expert.

        The latter has the gradients of the experts' outputs and of the layer's, and of one expert three tensors in fp32
        for its weighted product, which is gone: in bf16 its gradient makes up for that.
        """
        if layer < self.dense_layers:
            return swiglu_gradients(self.hidden_size, self.intermediate_size or 0, layout, precision)
        hidden, top_k, local = self.hidden_size, self.num_experts_per_tok, self.experts // layout.ep
        size, weighted = (4, 2 * 4) if precision == "fp32" else (2, 3 * 4)
        outputs = size * (top_k * layout.split_experts + 1) * hidden
        return max(
            sent_tokens(hidden, top_k, layout, precision, alone=local == 1),
            outputs + weighted * self.moe_intermediate_size * top_k / local,
        )

    def layer_moved(self, layout: Layout, precision: Precision, layer: int) -> float:
        if layer < self.dense_layers:
            return 0.0
        return sent_tokens(self.hidden_size, self.num_experts_per_tok, layout, precision, alone=False)

    def expert_split_sizes(self) -> list[tuple[str, str, int]]:
        inner, experts = super().expert_split_sizes()
        dense = ("tp", "intermediate_size", self.intermediate_size or 0)
        shared = ("tp", "shared_expert_intermediate_size", self.shared_width)
        return [inner, dense, shared, experts]

    def expert_widths(self) -> dict[str, int]:
        """As `inner_widths`, of the feed-forward parts."""
        widths = {
            "expert": self.moe_intermediate_size,
            "dense": self.intermediate_size or 0,
            "shared expert": self.shared_width,
        }
        return {name: size for name, size in widths.items() if size}

    def scaled_experts(self, width: Callable[[int], int]) -> dict[str, Any]:
        return {
            **super().scaled_experts(width),
            "dense_layers": min(self.dense_layers, 1),
            "intermediate_size": self.intermediate_size and width(self.intermediate_size),
        }


class GroupedMixtureConfig(MixtureConfig, GroupedQueryConfig):
    """A decoder of grouped-query attention whose layers have SwiGLUs as experts."""

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), *self.expert_split_sizes()]

    def proportions(self) -> dict[str, float]:
        return {**super().proportions(), **self.expert_proportions()}

    def describe(self) -> str:
        return f"{super().describe()}, {self.describe_experts()}"

    def inner_widths(self) -> dict[str, int]:
        return {**super().inner_widths(), **self.expert_widths()}

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        changes = super().scaled(hidden_size, width)
        if not changes:
            return changes
        return {**changes, **self.scaled_experts(width)}


def sent_tokens(hidden_size: int, top_k: int, layout: Layout, precision: Precision, alone: bool) -> float:
    """Returns the bytes of tokens on their way to experts and back, for each of a rank's tokens.

    They are counted as sorted for the ranks that have them, as received, as the experts return them and as sorted back.
    With all experts on one rank these are what each expert returns, and that side by side. Ranks that split experts sum
    what these return, below fp32 after another copy in fp32, and have their part of the sum. If all ranks gather all
    tokens, there are as many outputs, which are summed in fp32.

    `alone` means that a rank has one expert, for which nothing is sorted: it gets what is received, and returns what is
    sent.
    """
    size = 4 if precision == "fp32" else 2
    split = layout.split_experts
    # Numbers of a token's copies for the experts that it visits.
    copies = hidden_size * top_k
    in_fp32 = 0 if precision == "fp32" else 4  # bytes of a copy in fp32 of what is summed
    if layout.ep * split == 1:
        return 2 * size * copies
    if layout.dispatcher == "allgather":
        outputs = (size + in_fp32) * layout.ep * split * hidden_size
        return max(2 * split * size * copies, outputs + 4 * hidden_size)
    if split == 1:
        return (3 if alone else 4) * size * copies
    # Ranks that split experts sum their outputs, below fp32 after a copy in fp32.
    sent = 2 if layout.ep > 1 else 1
    returned = (1 if alone else 2) * split
    return ((sent + returned) * size + in_fp32 * split + 4) * copies


def proxy_experts(experts: int, top_k: int) -> tuple[int, int]:
    """Returns at most PROXY_EXPERTS experts, of which a token visits a share as near to the recipe's as possible.

    The first number is the experts, the second those that a token visits. Of equally near choices, the one with the
    fewest visited experts is taken.
    """
    if experts <= PROXY_EXPERTS:
        return experts, top_k

    ratio = experts / top_k
    choices = []
    for visited in range(2, min(top_k, PROXY_EXPERTS) + 1):
        count = max(visited, min(PROXY_EXPERTS, round(visited * experts / top_k)))
        choices.append((abs(count / visited - ratio), visited, count))
    _, visited, count = min(choices)
    return count, visited


class SigmoidMixtureConfig(MixtureConfig):
    """A decoder whose layers have SwiGLUs as experts, scored by sigmoids with a bias for each (DeepSeek-V3)."""

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

    @property
    def has_expert_bias(self) -> bool:
        return True

    def expert_proportions(self) -> dict[str, float]:
        return {**super().expert_proportions(), "groups / groups a token visits": self.n_group / self.topk_group}

    def describe_experts(self) -> str:
        return f"{super().describe_experts()}, and {self.n_shared_experts} that all visit"

    def scaled_experts(self, width: Callable[[int], int]) -> dict[str, Any]:
        experts = super().scaled_experts(width)
        return {**experts, **self._scaled_groups(experts["experts"], experts["num_experts_per_tok"])}

    def _scaled_groups(self, experts: int, top_k: int) -> dict[str, int]:
        """Returns the groups of a proxy with so many experts, and how many of them a token visits.

        Their ratio is as near to the recipe's as possible. It is one group if no other number fits.
        """
        topk_group = top_k // BEST
        wanted = self.n_group * topk_group / self.topk_group
        fitting = []
        for n_group in range(topk_group, experts // BEST + 1):
            if experts % n_group == 0 and topk_group * experts // n_group >= top_k:
                fitting.append(n_group)
        if self.n_group == 1 or not fitting or top_k // topk_group != BEST:
            return {"n_group": 1, "topk_group": 1}
        return {"n_group": min(fitting, key=lambda n_group: abs(n_group - wanted)), "topk_group": topk_group}
