"""A mixture of experts of the GLM-4.5 shape (arXiv:2508.06471). transformers loads its export as Glm4MoeForCausalLM.

Every layer is grouped-query attention, of whose heads a part has rotary embedding; queries, keys and values may have
biases, and queries and keys a norm. The feed-forward part is that of DeepSeek-V3. Without multi-token prediction. No
torch here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pipeline.core.bounds import Flag
from stages.models.base import UntiedConfig
from stages.models.grouped_query import PartialRotaryConfig, RotaryPart
from stages.models.mixture import GroupedMixtureConfig, SigmoidMixtureConfig


class Glm4MoeConfig(UntiedConfig, SigmoidMixtureConfig, GroupedMixtureConfig, PartialRotaryConfig):
    """A mixture of experts with shared ones and partial rotary embedding: `architecture: glm4_moe`."""

    spec_module: ClassVar[str] = "stages.mcore.architectures.glm4_moe"
    architecture: Literal["glm4_moe"]
    """glm4_moe: a mixture of experts with shared ones, chosen by sigmoids, and grouped-query attention"""
    partial_rotary_factor: RotaryPart = 0.5
    """share of a head that has rotary embedding"""
    attention_bias: Flag = True
    """biases of queries, keys and values"""
    use_qk_norm: Flag = False
    """normalize each head's queries and keys"""

    @property
    def qk_norm(self) -> bool:
        return self.use_qk_norm

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias
