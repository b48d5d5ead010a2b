"""GLM-4.5 for Megatron, and as transformers' Glm4MoeForCausalLM.

Experts are written one by one, as in published checkpoints; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from stages.mcore.architectures.grouped_query import (
    hf_attention,
    hf_rotary_part,
    map_from_hf,
    map_to_hf,
    megatron_attention,
)
from stages.mcore.architectures.hf_mapping import Tensors
from stages.mcore.architectures.mixture import (
    hf_sigmoid_experts,
    megatron_sigmoid_experts,
    sigmoid_router,
    sigmoid_swiglus,
)
from stages.mcore.layer_spec import layer_spec
from stages.models.base import ModelSpec
from stages.models.glm4_moe import Glm4MoeConfig


def megatron(model: Glm4MoeConfig) -> dict[str, Any]:
    return megatron_attention(model) | megatron_sigmoid_experts(model)


def to_hf(tensors: Tensors, model: Glm4MoeConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    return map_to_hf(tensors, model, vocab_size, partial(sigmoid_router, model), partial(sigmoid_swiglus, model))


def from_hf(tensors: Tensors, model: Glm4MoeConfig) -> Iterator[tuple[str, Tensor]]:
    return map_from_hf(tensors, model, partial(sigmoid_router, model), partial(sigmoid_swiglus, model))


def hf_config(model: Glm4MoeConfig) -> dict[str, Any]:
    return {
        **hf_attention(model),
        **hf_rotary_part(model),
        **hf_sigmoid_experts(model),
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "use_qk_norm": model.use_qk_norm,
    }


SPEC = ModelSpec(megatron, layer_spec, to_hf, from_hf, hf_config)
