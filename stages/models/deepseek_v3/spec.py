"""DeepSeek-V3 for Megatron, and as transformers' DeepseekV3ForCausalLM.

Experts are written one by one, as in published checkpoints; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from stages.mcore.latent_attention import latent_layer_spec
from stages.mcore.rope import yarn_factor
from stages.models.base import ModelSpec
from stages.models.deepseek_v3.config import DeepseekV3Config

OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
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
    "mlp.router": "mlp.gate",
}
"""Megatron's and transformers' modules in a layer whose `weight` is the same."""
BIAS = {"mlp.router.expert_bias": "mlp.gate.e_score_correction_bias"}


def megatron(model: DeepseekV3Config) -> dict[str, Any]:
    """`softmax_scale`: with YaRN also the square of its factor, which queries and keys have each."""
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
        "ffn_hidden_size": model.intermediate_size or model.moe_intermediate_size,
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_layer_freq": [0] * model.dense_layers + [1] * (model.layers - model.dense_layers),
        "moe_shared_expert_intermediate_size": model.shared_width,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": model.n_group if model.n_group > 1 else None,
        "moe_router_group_topk": model.topk_group if model.n_group > 1 else None,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": {"batch": "aux_loss", "sequence": "seq_aux_loss"}[model.balance],
        "moe_aux_loss_coeff": model.aux_loss,
        "moe_z_loss_coeff": model.z_loss or None,
    }


def _same(model: DeepseekV3Config) -> Iterator[tuple[str, str]]:
    """(Megatron's, transformers') names of tensors of one layout in both, as the model has them: the table, the last
    norm and the head, then layer by layer. A SwiGLU is (prefix, prefix) with a last dot."""
    shapes = model.shapes(1)
    yield from ((a, b) for a, b in OUTSIDE.items() if a in shapes)
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        names = {**{f"{x}.weight": f"{y}.weight" for x, y in IN_LAYER.items()}, **BIAS}
        yield from ((a + x, b + y) for x, y in names.items() if a + x in shapes)
        if layer < model.dense_layers:
            yield a + "mlp.", b + "mlp."
        else:
            yield a + "mlp.shared_experts.", b + "mlp.shared_experts."
            for e in range(model.experts):
                yield f"{a}mlp.experts.local_experts.{e}.", f"{b}mlp.experts.{e}."


def to_hf(
    tensors: Mapping[str, torch.Tensor], model: DeepseekV3Config, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """A `linear_fc1` is gate above up. transformers pairs the rotary dimensions of a head as Megatron's do: two
    neighbors turn together (`rope_interleave`)."""
    for ours, theirs in _same(model):
        if theirs.endswith("."):
            gate, up = tensors[ours + "linear_fc1.weight"].chunk(2, 0)
            yield theirs + "gate_proj.weight", gate
            yield theirs + "up_proj.weight", up
            yield theirs + "down_proj.weight", tensors[ours + "linear_fc2.weight"]
        else:
            has_vocabulary = theirs in ("model.embed_tokens.weight", "lm_head.weight")
            yield theirs, tensors[ours][:vocab_size] if has_vocabulary else tensors[ours]


def from_hf(tensors: Mapping[str, torch.Tensor], model: DeepseekV3Config) -> Iterator[tuple[str, torch.Tensor]]:
    remaining = set(tensors)

    def take(name: str) -> torch.Tensor:
        remaining.discard(name)
        return tensors[name]

    for ours, theirs in _same(model):
        if theirs.endswith("."):
            halves = [take(theirs + "gate_proj.weight"), take(theirs + "up_proj.weight")]
            yield ours + "linear_fc1.weight", torch.cat(halves, 0)
            yield ours + "linear_fc2.weight", take(theirs + "down_proj.weight")
        else:
            yield ours, take(theirs)
    if remaining:
        raise ValueError(f"tensors that {model.architecture} does not have: {', '.join(sorted(remaining)[:3])}")


def hf_config(model: DeepseekV3Config) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": model.dense_layers,
        "hidden_act": "silu",
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size * model.num_experts_per_tok,
        "kv_lora_rank": model.kv_lora_rank,
        "moe_intermediate_size": model.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": model.n_group,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.n_shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.num_experts_per_tok,
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "rope_interleave": True,
        "routed_scaling_factor": model.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_group": model.topk_group,
        "topk_method": "noaux_tc",
        "v_head_dim": model.v_head_dim,
    }


SPEC = ModelSpec(megatron, latent_layer_spec, to_hf, from_hf, hf_config)
