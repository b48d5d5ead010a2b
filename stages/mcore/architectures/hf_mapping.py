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
"""Of the tensors in no layer: Megatron's name, and transformers'."""
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""transformers' tensors with a row for each token."""


def map_to_hf(
    tensors: Tensors, model: ModelConfig, vocab_size: int, same: Same, swiglus: Swiglus, rest: Rest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """transformers' tensors, layer by layer; each of Megatron's is read once. Rows of the vocabulary beyond
    `vocab_size` are padding and left out. A `linear_fc1` is gate above up."""
    for ours, theirs in _outside(model).items():
        yield theirs, tensors[ours][:vocab_size] if theirs in BY_TOKEN else tensors[ours]
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in same(layer).items():
            yield b + theirs, tensors[a + ours]
        for name, tensor in rest(partial(_read, tensors.__getitem__, a), layer) if rest else ():
            yield b + name, tensor
        for e, f in swiglus(layer):
            gate, up = tensors[a + e + "linear_fc1.weight"].chunk(2, 0)
            yield b + f + "gate_proj.weight", gate
            yield b + f + "up_proj.weight", up
            yield b + f + "down_proj.weight", tensors[a + e + "linear_fc2.weight"]


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

    for ours, theirs in _outside(model).items():
        yield ours, take(theirs)
    for layer in range(model.layers):
        a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in same(layer).items():
            yield a + ours, take(b + theirs)
        for name, tensor in rest(partial(_read, take, b), layer) if rest else ():
            yield a + name, tensor
        for e, f in swiglus(layer):
            halves = [take(b + f + "gate_proj.weight"), take(b + f + "up_proj.weight")]
            yield a + e + "linear_fc1.weight", torch.cat(halves, 0)
            yield a + e + "linear_fc2.weight", take(b + f + "down_proj.weight")
    if remaining:
        raise ValueError(f"tensors that {model.architecture} does not have: {', '.join(sorted(remaining)[:3])}")


def _outside(model: ModelConfig) -> dict[str, str]:
    return {ours: theirs for ours, theirs in OUTSIDE.items() if theirs != "lm_head.weight" or not model.tie_embeddings}


def _read(read: Read, at: str, name: str) -> Tensor:
    """A tensor of a layer by its name there. at: what the names of the layer begin with in the model."""
    return read(at + name)
