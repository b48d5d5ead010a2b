"""Names and layouts of a decoder's tensors in Megatron and in transformers, and back: what all architectures share.

Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import AtomError
from stages.mcore.architectures import architecture_of
from stages.mcore.row_tables import frequencies
from stages.models.base import EXPERT, ModelConfig
from stages.models.grouped_query import GroupedQueryConfig

OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Names of the tensors outside of layers, Megatron's to transformers'."""
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""The tensors of transformers with a row for each token."""
QKV = "self_attention.linear_qkv."
"""The beginning of the names of Megatron's queries, keys and values in a layer."""


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yields transformers' names and tensors one after the other, layer by layer; each of Megatron's is read once.

    A mapping of full tensors may read each on access, so a model of any size passes through one tensor at a time. Rows
    of the vocabulary beyond `vocab_size` are padding and left out.

    A group of heads in `linear_qkv` ([kv_heads, heads/kv_heads + 2, head_dim, ...]) is its queries, its key, its value.
    A `linear_fc1` is gate above up.
    """
    for megatron_name, hf_name in _outside(model).items():
        yield hf_name, tensors[megatron_name][:vocab_size] if hf_name in BY_TOKEN else tensors[megatron_name]
    for layer in range(model.layers):
        megatron_at, hf_at = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        same, projections, swiglus = _of_layer(model, layer)
        for megatron_name, hf_name in same.items():
            yield hf_at + hf_name, tensors[megatron_at + megatron_name]
        for kind in projections:
            assert isinstance(model, GroupedQueryConfig)
            groups = (model.kv_heads, model.heads // model.kv_heads + 2, model.head_dim)
            qkv = tensors[megatron_at + QKV + kind].unflatten(0, groups)
            for part, tensor in zip("qkv", qkv.split((groups[1] - 2, 1, 1), 1), strict=True):
                yield f"{hf_at}self_attn.{part}_proj.{kind}", tensor.flatten(0, 2)
        for megatron_part, hf_part in swiglus:
            gate, up = tensors[megatron_at + megatron_part + "linear_fc1.weight"].chunk(2, 0)
            yield hf_at + hf_part + "gate_proj.weight", gate
            yield hf_at + hf_part + "up_proj.weight", up
            yield hf_at + hf_part + "down_proj.weight", tensors[megatron_at + megatron_part + "linear_fc2.weight"]


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_hf`; the vocabulary has as many rows as transformers'.

    Raises KeyError at a tensor that is missing, and at the end ValueError, naming them, if some are left over.
    """
    remaining = set(tensors)

    def take(name: str) -> Tensor:
        remaining.discard(name)
        return tensors[name]

    for megatron_name, hf_name in _outside(model).items():
        yield megatron_name, take(hf_name)
    for layer in range(model.layers):
        megatron_at, hf_at = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        same, projections, swiglus = _of_layer(model, layer)
        for megatron_name, hf_name in same.items():
            yield megatron_at + megatron_name, take(hf_at + hf_name)
        for kind in projections:
            assert isinstance(model, GroupedQueryConfig)
            parts = [take(f"{hf_at}self_attn.{part}_proj.{kind}") for part in "qkv"]
            heads = [part.unflatten(0, (model.kv_heads, -1, model.head_dim)) for part in parts]
            yield megatron_at + QKV + kind, torch.cat(heads, 1).flatten(0, 2)
        for megatron_part, hf_part in swiglus:
            halves = [take(hf_at + hf_part + "gate_proj.weight"), take(hf_at + hf_part + "up_proj.weight")]
            yield megatron_at + megatron_part + "linear_fc1.weight", torch.cat(halves, 0)
            yield megatron_at + megatron_part + "linear_fc2.weight", take(hf_at + hf_part + "down_proj.weight")
    if remaining:
        raise ValueError(f"tensors that {model.architecture} does not have: {', '.join(sorted(remaining)[:3])}")


def _outside(model: ModelConfig) -> dict[str, str]:
    return {
        megatron_name: hf_name
        for megatron_name, hf_name in OUTSIDE.items()
        if hf_name != "lm_head.weight" or not model.tie_embeddings
    }


def _of_layer(model: ModelConfig, layer: int) -> tuple[dict[str, str], list[str], list[tuple[str, str]]]:
    """Returns the names of a layer's tensors in three groups.

    The first are those of one layout, Megatron's to transformers'. The second are the endings of `linear_qkv`. The
    third are the SwiGLUs, by the beginnings of their names in both.
    """
    names = model.layer_shapes(layer)
    same = {x: y for x, y in architecture_of(model).names.items() if x in names}
    projections = [name.removeprefix(QKV) for name in names if name.startswith(QKV)]
    swiglus = []
    for part in (name.removesuffix("linear_fc1.weight") for name in names if name.endswith("linear_fc1.weight")):
        if EXPERT in part:
            assert model.routing is not None
            swiglus += [(part.format(n), f"mlp.experts.{n}.") for n in range(model.routing.experts)]
        else:
            swiglus.append((part, part))
    return same, projections, swiglus


def hf_config(model: ModelConfig, vocab_size: int, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the entries of the architecture and the common ones.

    The rotary embedding has two forms: transformers 5 reads `rope_parameters`, older programs read `rope_theta` and
    `rope_scaling`. Raises AtomError for a property that the class in transformers cannot express.
    """
    if problem := model.export_obstacle():
        raise AtomError(problem)
    entries = architecture_of(model).hf_config(model)
    rope = hf_rope(model) | entries.get("rope_parameters", {})
    return entries | {
        "bos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": eos_token_id,
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.context_length,
        "num_hidden_layers": model.layers,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        # The entries of transformers 4, which other readers of config.json still look for.
        "rope_scaling": None if model.yarn is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def hf_rope(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, which vLLM reads as well."""
    if model.yarn is None:
        return {"rope_theta": model.rope_theta, "rope_type": "default"}
    factor = frequencies(model)[1]
    return {
        "rope_theta": model.rope_theta,
        "rope_type": "yarn",
        "factor": model.yarn.factor,
        "original_max_position_embeddings": model.yarn.original_length,
        "beta_fast": model.yarn.beta_fast,
        "beta_slow": model.yarn.beta_slow,
        # vLLM scales complete heads only if no attention_factor is stated
        **({"mscale": 1.0, "mscale_all_dim": 1.0} if model.yarn_scales_heads else {"attention_factor": factor}),
    }
