"""A mixture of experts as DeepSeek-V3's (arXiv:2412.19437), which GLM-4.5 shares: experts are chosen by sigmoid scores
with a bias, within the best groups of experts, beside shared ones. For decoders with any attention. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from stages.models.mixture import Experts, MixtureConfig

BEST = 2
"""The score of a group of experts is the sum of its two best ones (DeepSeek-V3, section 2.1.2)."""


class SigmoidMixtureConfig(MixtureConfig):
    """A decoder whose layers have such experts."""

    router_bias_update_rate: Annotated[float, Range(0, 1, "DeepSeek-V3: 0.001")] = Field(
        1e-3, description="change of an expert's bias per step in auxiliary-loss-free balancing; 0: biases stay zero"
    )
    n_shared_experts: Annotated[int, Range(1, 64, "DeepSeek-V3: 1, Moonlight: 2")] = Field(
        1, description="experts that every token uses"
    )
    n_group: Experts = Field(1, description="groups of the experts of a layer; 1: no groups")
    topk_group: Experts = Field(1, description="groups from which the experts of a token are chosen")
    routed_scaling_factor: Annotated[float, Range(0, 100, "DeepSeek-V3: 2.5, Kimi K2: 2.827", above=True)] = Field(
        1.0, description="factor of the sum of the routed experts, whose weights sum to 1"
    )

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
        """Groups for a proxy with so many experts, of which a token visits as large a share as possible of the
        recipe's; one group if no other number fits."""
        chosen = top_k // BEST
        wanted = self.n_group * chosen / self.topk_group
        sizes = [n for n in range(chosen, experts // BEST + 1) if experts % n == 0 and chosen * experts // n >= top_k]
        if self.n_group == 1 or not sizes or top_k // chosen != BEST:
            return {"n_group": 1, "topk_group": 1}
        return {"n_group": min(sizes, key=lambda n: abs(n - wanted)), "topk_group": chosen}
