"""Qwen3-MoE for Megatron, and as transformers' Qwen3MoeForCausalLM.

Experts are written one by one, as `save_pretrained` writes them; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from stages.mcore.architectures.grouped_query import hf_attention, map_from_hf, map_to_hf, megatron_attention
from stages.mcore.architectures.mixture import expert_swiglus, megatron_experts
from stages.mcore.layer_spec import layer_spec
from stages.models.base import ModelSpec
from stages.models.qwen3_moe import Qwen3MoeConfig


def megatron(model: Qwen3MoeConfig) -> dict[str, Any]:
    """Returns keyword arguments of Megatron's TransformerConfig."""
    return megatron_attention(model) | {
        "ffn_hidden_size": model.intermediate_size or model.moe_intermediate_size,
        **megatron_experts(model),
        "moe_shared_expert_intermediate_size": model.shared_expert_intermediate_size,
        "moe_router_pre_softmax": False,  # softmax over the chosen experts = Hugging Face's norm_topk_prob
        # Megatron has biases of experts only with sigmoids.
        "moe_router_score_function": "sigmoid" if model.router_bias_update_rate else "softmax",
        "moe_router_enable_expert_bias": model.router_bias_update_rate > 0,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
    }


def _router(model: Qwen3MoeConfig, layer: int) -> dict[str, str]:
    """Returns {Megatron's name: transformers' name} of a layer's router; nothing for a dense layer."""
    return {} if layer < model.dense_layers else {"mlp.router.weight": "mlp.gate.weight"}


def _swiglus(model: Qwen3MoeConfig, layer: int) -> list[tuple[str, str]]:
    """Returns (Megatron's, transformers') prefixes of a layer's SwiGLUs.

    It is one in a dense layer, else one for each expert.
    """
    if layer < model.dense_layers:
        return [("mlp.", "mlp.")]
    return expert_swiglus(model)


def to_hf(tensors: Mapping[str, Tensor], model: Qwen3MoeConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    return map_to_hf(tensors, model, vocab_size, partial(_router, model), partial(_swiglus, model))


def from_hf(tensors: Mapping[str, Tensor], model: Qwen3MoeConfig) -> Iterator[tuple[str, Tensor]]:
    return map_from_hf(tensors, model, partial(_router, model), partial(_swiglus, model))


def hf_config(model: Qwen3MoeConfig) -> dict[str, Any]:
    """Returns the entries of config.json."""
    return hf_attention(model) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size * model.num_experts_per_tok,
        "mlp_only_layers": list(range(model.dense_layers)),
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_experts": model.experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "output_router_logits": False,
        # Megatron divides its balance loss by num_experts_per_tok and sums it over layers; transformers does neither.
        "router_aux_loss_coef": model.aux_loss * (model.layers - model.dense_layers) / model.num_experts_per_tok,
    }


SPEC = ModelSpec(megatron, layer_spec, to_hf, from_hf, hf_config)
