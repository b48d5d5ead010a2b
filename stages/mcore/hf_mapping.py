"""Names and layouts of a decoder's tensors in Megatron and in transformers, and back: what all architectures share.

Pure functions, exact in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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


class Mapped(NamedTuple):
    """A tensor of Megatron, and those of transformers that it is made of.

    Attributes:
        name: Megatron's global name.
        hf_names: The names in transformers.
        split: Cuts Megatron's tensor into those of transformers.
        join: The inverse.
    """

    name: str
    hf_names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)
    join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yields transformers' names and tensors one after the other, layer by layer; each of Megatron's is read once.

    A mapping of full tensors may read each on access, so a model of any size passes through one tensor at a time. Rows
    of the vocabulary beyond `vocab_size` are padding and left out.
    """
    for mapped in _mapping(model):
        for hf_name, part in zip(mapped.hf_names, mapped.split(tensors[mapped.name]), strict=True):
            yield hf_name, part[:vocab_size] if hf_name in BY_TOKEN else part


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_hf`; the vocabulary has as many rows as transformers'.

    Raises KeyError at a tensor that is missing, and at the end ValueError, naming them, if some are left over.
    """
    remaining = set(tensors)
    for mapped in _mapping(model):
        remaining -= set(mapped.hf_names)
        yield mapped.name, mapped.join([tensors[hf_name] for hf_name in mapped.hf_names])
    if remaining:
        raise ValueError(f"tensors that {model.architecture} does not have: {', '.join(sorted(remaining)[:3])}")


def _mapping(model: ModelConfig) -> Iterator[Mapped]:
    """Yields all tensors, layer by layer: those of one layout, queries with keys and values, and SwiGLUs."""
    for name, hf_name in OUTSIDE.items():
        if hf_name != "lm_head.weight" or not model.tie_embeddings:
            yield Mapped(name, (hf_name,))
    for layer in range(model.layers):
        at, hf_at, names = f"decoder.layers.{layer}.", f"model.layers.{layer}.", model.layer_shapes(layer)
        for name, hf_name in architecture_of(model).names.items():
            if name in names:
                yield Mapped(at + name, (hf_at + hf_name,))
        for kind in (name.removeprefix(QKV) for name in names if name.startswith(QKV)):
            assert isinstance(model, GroupedQueryConfig)
            hf_names = tuple(f"{hf_at}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Mapped(at + QKV + kind, hf_names, partial(_split_heads, model), partial(_join_heads, model))
        for part in (name.removesuffix("linear_fc1.weight") for name in names if name.endswith("linear_fc1.weight")):
            experts = model.routing.experts if EXPERT in part and model.routing else 1
            for place in dict.fromkeys(part.format(expert) for expert in range(experts)):
                swiglu = hf_at + place.replace(".local_experts.", ".")
                # A `linear_fc1` is gate above up.
                gate_and_up = f"{swiglu}gate_proj.weight", f"{swiglu}up_proj.weight"
                yield Mapped(f"{at}{place}linear_fc1.weight", gate_and_up, lambda tensor: tensor.chunk(2, 0), torch.cat)
                yield Mapped(f"{at}{place}linear_fc2.weight", (f"{swiglu}down_proj.weight",))


def _split_heads(model: GroupedQueryConfig, tensor: Tensor) -> Sequence[Tensor]:
    """Cuts `linear_qkv` into queries, keys and values.

    A group of heads ([kv_heads, heads/kv_heads + 2, head_dim, ...]) is its queries, its key, its value.
    """
    groups = (model.kv_heads, model.heads // model.kv_heads + 2, model.head_dim)
    parts = tensor.unflatten(0, groups).split((groups[1] - 2, 1, 1), 1)
    return [part.flatten(0, 2) for part in parts]


def _join_heads(model: GroupedQueryConfig, parts: list[Tensor]) -> Tensor:
    return torch.cat([part.unflatten(0, (model.kv_heads, -1, model.head_dim)) for part in parts], 1).flatten(0, 2)


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
