"""Names and layouts of a decoder's tensors in Megatron and in transformers, and back: what all architectures share.

Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

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
