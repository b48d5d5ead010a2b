"""Megatron's tensors as Hugging Face's Qwen3MoeForCausalLM and back: pure functions, exact in both directions.

Both sides are dictionaries of full tensors by name, Megatron's by global name (see `ModelConfig.shapes`). Experts are
written one by one, as `save_pretrained` writes them; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.core.errors import AtomError
from stages.mcore.rope import hf_rope
from stages.models.qwen3_moe.config import ModelConfig

Tensors = Mapping[str, torch.Tensor]

# What has one counterpart and the same layout: Megatron's name in a layer, and Hugging Face's.
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_ROUTER = ("mlp.router.weight", "mlp.gate.weight")


def _swiglus(model: ModelConfig, layer: int) -> list[tuple[str, str]]:
    """(Megatron's, Hugging Face's) prefixes of a layer's SwiGLUs: one in a dense layer, else one for each expert."""
    a, b = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    if layer < model.dense_layers:
        return [(a, b)]
    return [(f"{a}experts.local_experts.{e}.", f"{b}experts.{e}.") for e in range(model.experts)]


def to_hf(tensors: Tensors, model: ModelConfig, vocab_size: int) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors. Rows of the vocabulary beyond `vocab_size` are padding and left out.

    A head group of `linear_qkv` ([kv_heads, heads/kv_heads + 2, head_dim, hidden]) is its queries, its key, its value;
    an expert's `linear_fc1` is gate above up.
    """
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size
    out = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"][:vocab_size],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
    }
    if not model.tie_embeddings:
        out["lm_head.weight"] = tensors["output_layer.weight"][:vocab_size]
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in _SAME.items():
            out[b + theirs] = tensors[a + ours]
        qkv = tensors[a + "self_attention.linear_qkv.weight"].reshape(groups, queries + 2, dim, hidden)
        out[b + "self_attn.q_proj.weight"] = qkv[:, :queries].reshape(-1, hidden)
        out[b + "self_attn.k_proj.weight"] = qkv[:, queries].reshape(-1, hidden)
        out[b + "self_attn.v_proj.weight"] = qkv[:, queries + 1].reshape(-1, hidden)
        if layer >= model.dense_layers:
            out[b + _ROUTER[1]] = tensors[a + _ROUTER[0]]
        for e, f in _swiglus(model, layer):
            gate, up = tensors[e + "linear_fc1.weight"].chunk(2, 0)
            out[f + "gate_proj.weight"], out[f + "up_proj.weight"] = gate, up
            out[f + "down_proj.weight"] = tensors[e + "linear_fc2.weight"]
    return out


def from_hf(tensors: Tensors, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The inverse of `to_hf`; the vocabulary has as many rows as Hugging Face's.

    Raises KeyError if a tensor is missing and ValueError, naming them, if some are left over.
    """
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size
    rest = dict(tensors)
    out = {
        "embedding.word_embeddings.weight": rest.pop("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": rest.pop("model.norm.weight"),
    }
    if not model.tie_embeddings:
        out["output_layer.weight"] = rest.pop("lm_head.weight")
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in _SAME.items():
            out[a + ours] = rest.pop(b + theirs)
        q = rest.pop(b + "self_attn.q_proj.weight").reshape(groups, queries, dim, hidden)
        k = rest.pop(b + "self_attn.k_proj.weight").reshape(groups, 1, dim, hidden)
        v = rest.pop(b + "self_attn.v_proj.weight").reshape(groups, 1, dim, hidden)
        out[a + "self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).reshape(-1, hidden)
        if layer >= model.dense_layers:
            out[a + _ROUTER[0]] = rest.pop(b + _ROUTER[1])
        for e, f in _swiglus(model, layer):
            halves = [rest.pop(f + "gate_proj.weight"), rest.pop(f + "up_proj.weight")]
            out[e + "linear_fc1.weight"] = torch.cat(halves, 0)
            out[e + "linear_fc2.weight"] = rest.pop(f + "down_proj.weight")
    if rest:
        raise ValueError(f"tensors that Qwen3-MoE does not have: {', '.join(sorted(rest)[:3])}")
    return out


def hf_config(model: ModelConfig, vocab_size: int, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
    """config.json of the exported model.

    The rotary embedding stands twice: `rope_parameters` is read by transformers 5, `rope_theta` and `rope_scaling` by
    everything older. Raises AtomError for what Qwen3MoeForCausalLM cannot express.
    """
    if wrong := model.beyond_qwen3():
        raise AtomError(wrong)
    rope = hf_rope(model)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": eos_token_id,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size * model.num_experts_per_tok,
        "max_position_embeddings": model.context_length,
        "max_window_layers": model.layers,
        "mlp_only_layers": list(range(model.dense_layers)),
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": model.heads,
        "num_experts": model.experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "output_router_logits": False,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": None if model.yarn is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_theta": model.rope_theta,
        # Megatron divides its balance by num_experts_per_tok and sums it over layers; Hugging Face does neither
        "router_aux_loss_coef": model.aux_loss * (model.layers - model.dense_layers) / model.num_experts_per_tok,
        "sliding_window": None,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
