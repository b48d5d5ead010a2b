"""The architectures in Megatron and in transformers: settings, layers, and the names of tensors.

A line of ARCHITECTURES is what stages/models cannot state without torch. Experts are written one by one, as
`save_pretrained` and published checkpoints have them; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from stages.mcore.latent_attention import latent_layer_spec
from stages.mcore.layer_spec import layer_spec
from stages.mcore.row_tables import yarn_factor
from stages.models.base import ModelConfig
from stages.models.deepseek_v3 import DeepseekV3Config
from stages.models.grouped_query import GroupedQueryConfig, Qwen3Config
from stages.models.mixture import Glm4MoeConfig, MixtureConfig, Qwen3MoeConfig, SigmoidMixtureConfig

ROUTER = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}
GROUPED_QUERY = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    **ROUTER,
}
"""Megatron's and transformers' names of the tensors of a layer that have the same layout, if they are there."""
LATENT = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    **ROUTER,
}
"""The same of latent attention, where transformers pairs the rotary dimensions of a head as Megatron does."""


@dataclass(frozen=True)
class Architecture:
    """An architecture for Megatron and for transformers.

    Attributes:
        megatron: (model) -> keyword arguments of Megatron's TransformerConfig that are the architecture's own
            (stages/mcore/model.py adds those of size, layout and precision).
        hf_config: (model) -> entries of config.json that are the architecture's own (stages/mcore/hf_mapping.py adds
            the common ones).
        names: Megatron's and transformers' names of the tensors of a layer that have the same layout.
        layer_spec: (Megatron's TransformerConfig, virtual pipeline stage or None, whether rows are packed) -> the
            layers from which Megatron's model is built.
    """

    megatron: Callable[[Any], dict[str, Any]]
    hf_config: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]
    layer_spec: Callable[[Any, int | None, bool], Any]


COMMON = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
}


def megatron_attention(model: GroupedQueryConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig for grouped-query attention."""
    return COMMON | {
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "qk_layernorm": model.qk_norm,
        "add_qkv_bias": model.qkv_bias,
        "ffn_hidden_size": model.intermediate_size,
    }


def megatron_latent_attention(model: DeepseekV3Config) -> dict[str, Any]:
    """The same for latent attention, and experts.

    With YaRN, `softmax_scale` has the square of its factor, which queries and keys have each.
    """
    latent = {
        "multi_latent_attention": True,
        "num_attention_heads": model.heads,
        "kv_channels": model.v_head_dim,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "softmax_scale": yarn_factor(model) ** 2 / math.sqrt(model.qk_head_dim),
    }
    return COMMON | latent | megatron_experts(model)


def megatron_experts(model: MixtureConfig) -> dict[str, Any]:
    """The same for the feed-forward part of a mixture of experts."""
    words = {
        "ffn_hidden_size": model.intermediate_size or model.moe_intermediate_size,
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_layer_freq": [int(layer in model.routing.layers) for layer in range(model.layers)],
        "moe_router_dtype": "fp32",
        # "global": RouterWatch gives the loss of a micro-batch the load of a step.
        "moe_router_load_balancing_type": "seq_aux_loss" if model.balance == "sequence" else "aux_loss",
        "moe_aux_loss_coeff": model.aux_loss,
        "moe_z_loss_coeff": model.z_loss or None,
        "moe_shared_expert_intermediate_size": model.shared_width or None,
        "moe_router_pre_softmax": False,  # softmax over the chosen experts = Hugging Face's norm_topk_prob
    }
    if isinstance(model, SigmoidMixtureConfig):
        words |= {
            "moe_router_pre_softmax": True,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": model.router_bias_update_rate,
            "moe_router_num_groups": model.n_group if model.n_group > 1 else None,
            "moe_router_group_topk": model.topk_group if model.n_group > 1 else None,
            "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        }
    return words


def hf_attention(model: GroupedQueryConfig) -> dict[str, Any]:
    """Entries of config.json for grouped-query attention."""
    return {
        "attention_bias": model.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_window_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def hf_experts(model: MixtureConfig) -> dict[str, Any]:
    """Entries of config.json that all mixtures of experts have."""
    return {
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size * model.num_experts_per_tok,
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_experts_per_tok": model.num_experts_per_tok,
    }


def hf_sigmoid_experts(model: SigmoidMixtureConfig) -> dict[str, Any]:
    """Those of experts chosen by sigmoids: no layer predicts further tokens."""
    return hf_experts(model) | {
        "first_k_dense_replace": model.dense_layers,
        "n_group": model.n_group,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.n_shared_experts,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": model.routed_scaling_factor,
        "topk_group": model.topk_group,
    }


def qwen3_config(model: Qwen3Config) -> dict[str, Any]:
    """Entries of config.json for transformers' Qwen3ForCausalLM."""
    return hf_attention(model) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": model.intermediate_size,
    }


def qwen3_moe_config(model: Qwen3MoeConfig) -> dict[str, Any]:
    """Entries of config.json for transformers' Qwen3MoeForCausalLM."""
    return {
        **hf_attention(model),
        **hf_experts(model),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.dense_layers)),
        "num_experts": model.experts,
        "output_router_logits": False,
        # Megatron divides its balance loss by num_experts_per_tok and sums it over layers; transformers does neither.
        "router_aux_loss_coef": model.aux_loss * (model.layers - model.dense_layers) / model.num_experts_per_tok,
    }


def glm4_moe_config(model: Glm4MoeConfig) -> dict[str, Any]:
    """Entries of config.json for transformers' Glm4MoeForCausalLM."""
    rotary_part = {"partial_rotary_factor": model.partial_rotary_factor}
    return {
        **hf_attention(model),
        **rotary_part,
        "rope_parameters": rotary_part,
        **hf_sigmoid_experts(model),
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "use_qk_norm": model.use_qk_norm,
    }


def deepseek_v3_config(model: DeepseekV3Config) -> dict[str, Any]:
    """Entries of config.json for transformers' DeepseekV3ForCausalLM."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **hf_sigmoid_experts(model),
        "hidden_act": "silu",
        "kv_lora_rank": model.kv_lora_rank,
        "moe_layer_freq": 1,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "v_head_dim": model.v_head_dim,
    }


def megatron_mixture(model: Any) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig for experts and grouped-query attention."""
    return megatron_attention(model) | megatron_experts(model)


ARCHITECTURES = {
    "qwen3": Architecture(megatron_attention, qwen3_config, GROUPED_QUERY, layer_spec),
    "qwen3_moe": Architecture(megatron_mixture, qwen3_moe_config, GROUPED_QUERY, layer_spec),
    "glm4_moe": Architecture(megatron_mixture, glm4_moe_config, GROUPED_QUERY, layer_spec),
    "deepseek_v3": Architecture(megatron_latent_attention, deepseek_v3_config, LATENT, latent_layer_spec),
}


def architecture_of(model: ModelConfig) -> Architecture:
    """Returns the architecture of a model."""
    return ARCHITECTURES[model.architecture]
