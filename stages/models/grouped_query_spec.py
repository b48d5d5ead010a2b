"""The common parts of decoders with grouped-query attention in Megatron and in transformers: configuration, and the
names and shapes of tensors. Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stages.models.grouped_query import GroupedQueryConfig

Tensors = Mapping[str, torch.Tensor]
Same = Callable[[int], Mapping[str, str]]
"""(layer) -> tensors of its feed-forward part that have one counterpart of the same layout: Megatron's name in a layer,
and transformers'."""
Swiglus = Callable[[int], Sequence[tuple[str, str]]]
"""(layer) -> (Megatron's, transformers') prefixes of its SwiGLUs."""
Rest = Callable[[Callable[[str], torch.Tensor], int], Iterator[tuple[str, torch.Tensor]]]
"""(reads a tensor of a layer by its name there, layer) -> the layer's tensors of another layout, by names there: from
Megatron's to transformers', or back."""

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
    """transformers' tensors, layer by layer; each of Megatron's is read once. Rows of the vocabulary beyond
    `vocab_size` are padding and left out.

    A head group of `linear_qkv` ([kv_heads, heads/kv_heads + 2, head_dim, hidden]) is its queries, its key, its value;
    a `linear_fc1` is gate above up.
    """
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size
    yield "model.embed_tokens.weight", tensors["embedding.word_embeddings.weight"][:vocab_size]
    yield "model.norm.weight", tensors["decoder.final_layernorm.weight"]
    if not model.tie_embeddings:
        yield "lm_head.weight", tensors["output_layer.weight"][:vocab_size]
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for megatron_name, hf_name in {**SAME, **(QK_NORMS if model.qk_norm else {}), **same(layer)}.items():
            yield b + hf_name, tensors[a + megatron_name]
        qkv = tensors[a + "self_attention.linear_qkv.weight"].reshape(groups, queries + 2, dim, hidden)
        yield b + "self_attn.q_proj.weight", qkv[:, :queries].reshape(-1, hidden)
        yield b + "self_attn.k_proj.weight", qkv[:, queries].reshape(-1, hidden)
        yield b + "self_attn.v_proj.weight", qkv[:, queries + 1].reshape(-1, hidden)
        for e, f in swiglus(layer):
            gate, up = tensors[a + e + "linear_fc1.weight"].chunk(2, 0)
            yield b + f + "gate_proj.weight", gate
            yield b + f + "up_proj.weight", up
            yield b + f + "down_proj.weight", tensors[a + e + "linear_fc2.weight"]
        for name, tensor in rest(_reader(tensors.__getitem__, a), layer) if rest else ():
            yield b + name, tensor


def _reader(read: Callable[[str], torch.Tensor], at: str) -> Callable[[str], torch.Tensor]:
    """Reads the tensors of a layer by their names there. at: what these begin with in the model."""
    return lambda name: read(at + name)


def map_from_hf(
    tensors: Tensors, model: GroupedQueryConfig, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `map_to_hf`; the vocabulary has as many rows as transformers'.

    Raises KeyError at a tensor that is missing, and at the end ValueError, naming them, if some are left over.
    """
    groups, queries, dim, hidden = model.kv_heads, model.heads // model.kv_heads, model.head_dim, model.hidden_size
    remaining = set(tensors)

    def take(name: str) -> torch.Tensor:
        remaining.discard(name)
        return tensors[name]

    yield "embedding.word_embeddings.weight", take("model.embed_tokens.weight")
    yield "decoder.final_layernorm.weight", take("model.norm.weight")
    if not model.tie_embeddings:
        yield "output_layer.weight", take("lm_head.weight")
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for megatron_name, hf_name in {**SAME, **(QK_NORMS if model.qk_norm else {}), **same(layer)}.items():
            yield a + megatron_name, take(b + hf_name)
        q = take(b + "self_attn.q_proj.weight").reshape(groups, queries, dim, hidden)
        k = take(b + "self_attn.k_proj.weight").reshape(groups, 1, dim, hidden)
        v = take(b + "self_attn.v_proj.weight").reshape(groups, 1, dim, hidden)
        yield a + "self_attention.linear_qkv.weight", torch.cat([q, k, v], 1).reshape(-1, hidden)
        for e, f in swiglus(layer):
            halves = [take(b + f + "gate_proj.weight"), take(b + f + "up_proj.weight")]
            yield a + e + "linear_fc1.weight", torch.cat(halves, 0)
            yield a + e + "linear_fc2.weight", take(b + f + "down_proj.weight")
        for name, tensor in rest(_reader(take, b), layer) if rest else ():
            yield a + name, tensor
    if remaining:
        raise ValueError(f"tensors that {model.architecture} does not have: {', '.join(sorted(remaining)[:3])}")
