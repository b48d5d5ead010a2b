"""The common parts of decoders with grouped-query attention in Megatron and in transformers: configuration, and the
names and shapes of tensors. Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from stages.models import hf_mapping
from stages.models.grouped_query import GroupedQueryConfig
from stages.models.hf_mapping import Read, Rest, Same, Swiglus, Tensors

SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


def megatron_attention(model: GroupedQueryConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig."""
    return {
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "qk_layernorm": model.qk_norm,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


def hf_attention(model: GroupedQueryConfig) -> dict[str, Any]:
    """Entries of config.json."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_window_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def map_to_hf(
    tensors: Tensors, model: GroupedQueryConfig, vocab_size: int, same: Same, swiglus: Swiglus,
    rest: Rest | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """As `stages.models.hf_mapping.map_to_hf`, with the attention: the arguments are of the feed-forward part, and
    `rest` of all tensors of another layout but `linear_qkv`'s weight.

    A head group of it ([kv_heads, heads/kv_heads + 2, head_dim, hidden]) is its queries, its key, its value.
    """
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size

    def of_layer(read: Read, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        qkv = read("self_attention.linear_qkv.weight").reshape(groups, queries + 2, dim, hidden)
        yield "self_attn.q_proj.weight", qkv[:, :queries].reshape(-1, hidden)
        yield "self_attn.k_proj.weight", qkv[:, queries].reshape(-1, hidden)
        yield "self_attn.v_proj.weight", qkv[:, queries + 1].reshape(-1, hidden)
        yield from rest(read, layer) if rest else ()

    return hf_mapping.map_to_hf(tensors, model, vocab_size, _with_attention(model, same), swiglus, of_layer)


def map_from_hf(
    tensors: Tensors, model: GroupedQueryConfig, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `map_to_hf`, as `stages.models.hf_mapping.map_from_hf`."""
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size

    def of_layer(read: Read, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        q = read("self_attn.q_proj.weight").reshape(groups, queries, dim, hidden)
        k = read("self_attn.k_proj.weight").reshape(groups, 1, dim, hidden)
        v = read("self_attn.v_proj.weight").reshape(groups, 1, dim, hidden)
        yield "self_attention.linear_qkv.weight", torch.cat([q, k, v], 1).reshape(-1, hidden)
        yield from rest(read, layer) if rest else ()

    return hf_mapping.map_from_hf(tensors, model, _with_attention(model, same), swiglus, of_layer)


def _with_attention(model: GroupedQueryConfig, same: Same) -> Same:
    return lambda layer: {**SAME, **(QK_NORMS if model.qk_norm else {}), **same(layer)}
