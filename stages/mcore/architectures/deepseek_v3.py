"""DeepSeek-V3 for Megatron, and as transformers' DeepseekV3ForCausalLM.

Experts are written one by one, as in published checkpoints; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stages.mcore.architectures.hf_mapping import map_from_hf, map_to_hf
from stages.mcore.architectures.mixture import (
    hf_sigmoid_experts,
    megatron_sigmoid_experts,
    sigmoid_router,
    sigmoid_swiglus,
)
from stages.mcore.latent_attention import latent_layer_spec
from stages.mcore.row_tables import yarn_factor
from stages.models.base import ModelSpec
from stages.models.deepseek_v3 import DeepseekV3Config

IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
}
"""Megatron's and transformers' modules in a layer whose `weight` is the same."""
NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")


def megatron(model: DeepseekV3Config) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig.

    With YaRN, `softmax_scale` has the square of its factor, which queries and keys have each.
    """
    return {
        "multi_latent_attention": True,
        "num_attention_heads": model.heads,
        "kv_channels": model.v_head_dim,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "softmax_scale": yarn_factor(model) ** 2 / math.sqrt(model.qk_head_dim),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        **megatron_sigmoid_experts(model),
    }


def _same(model: DeepseekV3Config, layer: int) -> dict[str, str]:
    """Tensors of a layer with one layout in both, as the model has them: Megatron's name, and transformers'."""
    names = {f"{x}.weight": f"{y}.weight" for x, y in IN_LAYER.items()}
    present = {*NORMS, *(f"self_attention.{name}" for name in model.attention_shapes(layer))}
    return {
        megatron_name: hf_name for megatron_name, hf_name in names.items() if megatron_name in present
    } | sigmoid_router(model, layer)


def to_hf(tensors: Mapping[str, Tensor], model: DeepseekV3Config, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors under transformers' names and in its layout, without the padding of the vocabulary.

    transformers pairs the rotary dimensions of a head as Megatron does: two neighbors turn together
    (`rope_interleave`).
    """
    return map_to_hf(tensors, model, vocab_size, partial(_same, model), partial(sigmoid_swiglus, model))


def from_hf(tensors: Mapping[str, Tensor], model: DeepseekV3Config) -> Iterator[tuple[str, Tensor]]:
    return map_from_hf(tensors, model, partial(_same, model), partial(sigmoid_swiglus, model))


def hf_config(model: DeepseekV3Config) -> dict[str, Any]:
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


SPEC = ModelSpec(megatron, latent_layer_spec, to_hf, from_hf, hf_config)
