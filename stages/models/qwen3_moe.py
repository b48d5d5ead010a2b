"""A mixture of experts of the Qwen3-MoE shape.

Every layer is grouped-query attention with normalized queries and keys, followed by a mixture of SwiGLU experts of
which a token visits `num_experts_per_tok`; the first `dense_layers` have one SwiGLU instead. No torch here: `atom plan`
reads this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pipeline.core.stage import added
from stages.models.base import Width
from stages.models.mixture import GroupedMixtureConfig


class Qwen3MoeConfig(GroupedMixtureConfig):
    """A mixture of experts: `architecture: qwen3_moe`, the default of a section without this setting."""

    spec_module: ClassVar[str] = "stages.mcore.architectures.qwen3_moe"
    architecture: Literal["qwen3_moe"] = added("qwen3_moe")
    """qwen3_moe: a mixture of experts"""
    shared_expert_intermediate_size: Width | None = added(None)
    """inner width of a shared expert that every token uses; null: none"""

    @property
    def shared_width(self) -> int:
        return self.shared_expert_intermediate_size or 0

    def export_obstacle(self) -> str | None:
        for field, value, what in (
            ("router_bias_update_rate", self.router_bias_update_rate, "no bias of experts and no sigmoid scores"),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size, "no shared expert"),
        ):
            if value:
                return (
                    f"model.{field} = {value} cannot be exported: Qwen3MoeForCausalLM, which transformers, vLLM "
                    f"and others load unchanged, has {what}; leave it out, or stop before the export"
                )
        return None

    def scaled_experts(self, width: Callable[[int], int]) -> dict[str, Any]:
        shared = self.shared_expert_intermediate_size
        return {**super().scaled_experts(width), "shared_expert_intermediate_size": shared and width(shared)}
