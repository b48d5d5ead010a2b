"""Names and layouts of a decoder's tensors in Megatron and in transformers, and back: what all architectures share.

Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import AtomError
from stages.mcore.row_tables import frequencies
from stages.models.base import ModelConfig

Tensors = Mapping[str, Tensor]
Read = Callable[[str], Tensor]
"""Reads a tensor by its name."""
Same = Callable[[int], Mapping[str, str]]
"""(layer) -> its tensors with one counterpart of the same layout: Megatron's name in the layer, and transformers'."""
Swiglus = Callable[[int], Sequence[tuple[str, str]]]
"""(layer) -> (Megatron's, transformers') prefixes of its SwiGLUs."""
Rest = Callable[[Read, int], Iterator[tuple[str, Tensor]]]
"""(reads a tensor of a layer by its name there, layer) -> the layer's tensors of another layout, by names there: from
Megatron's to transformers', or back."""

OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Names of the tensors outside of layers, Megatron's to transformers'."""
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""The tensors of transformers with a row for each token."""


def map_to_hf(
    tensors: Tensors, model: ModelConfig, vocab_size: int, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of transformers, layer by layer; each of Megatron's is read once.

    Rows of the vocabulary beyond `vocab_size` are padding and left out. A `linear_fc1` is gate above up.
    """
    for megatron_name, hf_name in _outside(model).items():
        yield hf_name, tensors[megatron_name][:vocab_size] if hf_name in BY_TOKEN else tensors[megatron_name]
    for layer in range(model.layers):
        megatron_at, hf_at = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for megatron_name, hf_name in same(layer).items():
            yield hf_at + hf_name, tensors[megatron_at + megatron_name]
        for name, tensor in rest(partial(_read, tensors.__getitem__, megatron_at), layer) if rest else ():
            yield hf_at + name, tensor
        for megatron_part, hf_part in swiglus(layer):
            gate, up = tensors[megatron_at + megatron_part + "linear_fc1.weight"].chunk(2, 0)
            yield hf_at + hf_part + "gate_proj.weight", gate
            yield hf_at + hf_part + "up_proj.weight", up
            yield hf_at + hf_part + "down_proj.weight", tensors[megatron_at + megatron_part + "linear_fc2.weight"]


def map_from_hf(
    tensors: Tensors, model: ModelConfig, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `map_to_hf`; the vocabulary has as many rows as transformers'.

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
        for megatron_name, hf_name in same(layer).items():
            yield megatron_at + megatron_name, take(hf_at + hf_name)
        for name, tensor in rest(partial(_read, take, hf_at), layer) if rest else ():
            yield megatron_at + name, tensor
        for megatron_part, hf_part in swiglus(layer):
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


def _read(read: Read, at: str, name: str) -> Tensor:
    """A tensor of a layer by its name there. at: what the names of the layer begin with in the model."""
    return read(at + name)


def hf_config(model: ModelConfig, vocab_size: int, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the entries of the architecture and the common ones.

    The rotary embedding has two forms: transformers 5 reads `rope_parameters`, older programs read `rope_theta` and
    `rope_scaling`. Raises AtomError for a property that the class in transformers cannot express.
    """
    if problem := model.export_obstacle():
        raise AtomError(problem)
    entries = model.spec().hf_config(model)
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
