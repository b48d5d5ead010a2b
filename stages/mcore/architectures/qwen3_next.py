"""Qwen3-Next for Megatron, and as transformers' Qwen3NextForCausalLM.

Experts are written one by one, as `save_pretrained` writes them; transformers 5 stacks them when it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.mcore.architectures import qwen3_moe
from stages.mcore.architectures.grouped_query import QK_NORMS, SAME, hf_rotary_part
from stages.mcore.architectures.hf_mapping import Read, Tensors, map_from_hf, map_to_hf
from stages.mcore.architectures.mixture import expert_swiglus
from stages.mcore.architectures.qwen3_next_layers import layer_spec
from stages.models.base import ModelSpec
from stages.models.qwen3_next import Qwen3NextConfig

NORMS = {name: SAME[name] for name in ("input_layernorm.weight", "pre_mlp_layernorm.weight")}
FULL = {"self_attention.linear_proj.weight": "self_attn.o_proj.weight", **QK_NORMS}
LINEAR = {
    "self_attention.dt_bias": "linear_attn.dt_bias",
    "self_attention.A_log": "linear_attn.A_log",
    "self_attention.out_norm.weight": "linear_attn.norm.weight",
    "self_attention.out_proj.weight": "linear_attn.out_proj.weight",
}
SPARSE = {"mlp.router.weight": "mlp.gate.weight", "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight"}


def megatron(model: Qwen3NextConfig) -> dict[str, Any]:
    return qwen3_moe.megatron(model) | {
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "moe_shared_expert_gate": True,
        "linear_attention_freq": [int(model.is_linear(layer)) for layer in range(model.layers)],
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
    }


def _same(model: Qwen3NextConfig, layer: int) -> dict[str, str]:
    """Tensors of a layer with one counterpart of the same layout: Megatron's name, and transformers'."""
    attention = LINEAR if model.is_linear(layer) else FULL
    return NORMS | attention | ({} if layer < model.dense_layers else SPARSE)


def _swiglus(model: Qwen3NextConfig, layer: int) -> list[tuple[str, str]]:
    """(Megatron's, transformers') prefixes of a layer's SwiGLUs."""
    if layer < model.dense_layers:
        return [("mlp.", "mlp.")]
    return [*expert_swiglus(model), ("mlp.shared_experts.", "mlp.shared_expert.")]


def _parts(model: Qwen3NextConfig, layer: int) -> tuple[list[int], list[int]]:
    """Rows by part of one group of heads in Megatron's projection of a layer, and sizes of its convolution channels.

    In linear attention a group is a key head: its query, key, values, output gates, rates and decays. In full attention
    it is queries, their gates, key and value. The channels are those of a key head.
    """
    if not model.is_linear(layer):
        queries = model.heads // model.kv_heads * model.head_dim
        return [queries, queries, model.head_dim, model.head_dim], []
    group = model.linear_num_value_heads // model.linear_num_key_heads
    key, value = model.linear_key_head_dim, group * model.linear_value_head_dim
    return [key, key, value, value, group, group], [key, key, value]


def _split(tensor: Tensor, groups: int, sizes: list[int]) -> list[Tensor]:
    """The parts of each group of rows: [groups, size, ...]."""
    return list(tensor.unflatten(0, (groups, -1)).split(sizes, 1))


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1).flatten(0, 1)


def to_hf(tensors: Tensors, model: Qwen3NextConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    def attention(read: Read, layer: int) -> Iterator[tuple[str, Tensor]]:
        rows, channels = _parts(model, layer)
        if model.is_linear(layer):
            parts = _split(read("self_attention.in_proj.weight"), model.linear_num_key_heads, rows)
            yield "linear_attn.in_proj_qkvz.weight", _join(parts[:4])
            yield "linear_attn.in_proj_ba.weight", _join(parts[4:])
            parts = _split(read("self_attention.conv1d.weight"), model.linear_num_key_heads, channels)
            # The channels of all queries, then of all keys, then of all values.
            yield "linear_attn.conv1d.weight", torch.cat([part.flatten(0, 1) for part in parts])
        else:
            queries, gates, keys, values = _split(read("self_attention.linear_qkv.weight"), model.kv_heads, rows)
            heads = [part.unflatten(1, (-1, model.head_dim)).flatten(0, 1) for part in (queries, gates)]
            # Each head is its query, and then its gate.
            yield "self_attn.q_proj.weight", _join(heads)
            yield "self_attn.k_proj.weight", keys.flatten(0, 1)
            yield "self_attn.v_proj.weight", values.flatten(0, 1)

    return map_to_hf(tensors, model, vocab_size, partial(_same, model), partial(_swiglus, model), attention)


def from_hf(tensors: Tensors, model: Qwen3NextConfig) -> Iterator[tuple[str, Tensor]]:
    def attention(read: Read, layer: int) -> Iterator[tuple[str, Tensor]]:
        rows, channels = _parts(model, layer)
        if model.is_linear(layer):
            heads = model.linear_num_key_heads
            parts = _split(read("linear_attn.in_proj_qkvz.weight"), heads, rows[:4])
            parts += _split(read("linear_attn.in_proj_ba.weight"), heads, rows[4:])
            yield "self_attention.in_proj.weight", _join(parts)
            kinds = read("linear_attn.conv1d.weight").split([heads * size for size in channels])
            yield "self_attention.conv1d.weight", _join([part.unflatten(0, (heads, -1)) for part in kinds])
        else:
            query = read("self_attn.q_proj.weight").unflatten(0, (model.heads, 2, model.head_dim))
            queries, gates = (part.flatten(0, 1).unflatten(0, (model.kv_heads, -1)) for part in query.unbind(1))
            keys, values = (read(f"self_attn.{kind}_proj.weight").unflatten(0, (model.kv_heads, -1)) for kind in "kv")
            yield "self_attention.linear_qkv.weight", _join([queries, gates, keys, values])

    return map_from_hf(tensors, model, partial(_same, model), partial(_swiglus, model), attention)


def hf_config(model: Qwen3NextConfig) -> dict[str, Any]:
    kinds = ("full_attention", "linear_attention")
    return qwen3_moe.hf_config(model) | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "full_attention_interval": model.full_attention_interval,
        "layer_types": [kinds[model.is_linear(layer)] for layer in range(model.layers)],
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "linear_value_head_dim": model.linear_value_head_dim,
        **hf_rotary_part(model),
        "shared_expert_intermediate_size": model.shared_expert_intermediate_size,
    }


SPEC = ModelSpec(megatron, layer_spec, to_hf, from_hf, hf_config)
