"""The common parts of decoders with grouped-query attention in Megatron and in transformers.

These are the configuration, and the names and shapes of tensors. All are pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.mcore.architectures import hf_mapping
from stages.mcore.architectures.hf_mapping import Read, Rest, Same, Swiglus, Tensors
from stages.models.grouped_query import GroupedQueryConfig, PartialRotaryConfig

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
        "add_qkv_bias": model.qkv_bias,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


def hf_attention(model: GroupedQueryConfig) -> dict[str, Any]:
    """Entries of config.json."""
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


def hf_rotary_part(model: PartialRotaryConfig) -> dict[str, Any]:
    """Entries of config.json on the part of a head with rotary embedding."""
    factor = {"partial_rotary_factor": model.partial_rotary_factor}
    return {**factor, "rope_parameters": factor}


def map_to_hf(
    tensors: Tensors, model: GroupedQueryConfig, vocab_size: int, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """As `stages.mcore.architectures.hf_mapping.map_to_hf`, and maps the attention too.

    `same` and `swiglus` are of the feed-forward part. `rest` is of all tensors of another layout but those of
    `linear_qkv`.

    A head group of these ([kv_heads, heads/kv_heads + 2, head_dim, ...]) is its queries, its key, its value.
    """
    queries = model.heads // model.kv_heads

    def of_layer(read: Read, layer: int) -> Iterator[tuple[str, Tensor]]:
        for kind in _kinds(model):
            qkv = read(f"self_attention.linear_qkv.{kind}").unflatten(0, (model.kv_heads, queries + 2, model.head_dim))
            for part, tensor in zip("qkv", qkv.split((queries, 1, 1), 1), strict=True):
                yield f"self_attn.{part}_proj.{kind}", tensor.flatten(0, 2)
        yield from rest(read, layer) if rest else ()

    return hf_mapping.map_to_hf(tensors, model, vocab_size, _with_attention(model, same), swiglus, of_layer)


def map_from_hf(
    tensors: Tensors, model: GroupedQueryConfig, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `map_to_hf`, as `stages.mcore.architectures.hf_mapping.map_from_hf`."""

    def of_layer(read: Read, layer: int) -> Iterator[tuple[str, Tensor]]:
        for kind in _kinds(model):
            parts = [read(f"self_attn.{part}_proj.{kind}") for part in "qkv"]
            heads = [part.unflatten(0, (model.kv_heads, -1, model.head_dim)) for part in parts]
            yield f"self_attention.linear_qkv.{kind}", torch.cat(heads, 1).flatten(0, 2)
        yield from rest(read, layer) if rest else ()

    return hf_mapping.map_from_hf(tensors, model, _with_attention(model, same), swiglus, of_layer)


def _kinds(model: GroupedQueryConfig) -> tuple[str, ...]:
    """The tensors of a projection."""
    return ("weight", "bias") if model.qkv_bias else ("weight",)


def _with_attention(model: GroupedQueryConfig, same: Same) -> Same:
    return lambda layer: {**SAME, **(QK_NORMS if model.qk_norm else {}), **same(layer)}
