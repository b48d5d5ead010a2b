"""Qwen3 for Megatron, and as transformers' Qwen3ForCausalLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from stages.mcore.architectures.grouped_query import hf_attention, map_from_hf, map_to_hf, megatron_attention
from stages.mcore.layer_spec import layer_spec
from stages.models.base import ModelSpec
from stages.models.qwen3 import Qwen3Config

SWIGLU = [("mlp.", "mlp.")]
"""The SwiGLU of each layer, by the prefixes of its tensors in Megatron and in transformers."""


def megatron(model: Qwen3Config) -> dict[str, Any]:
    return megatron_attention(model) | {"ffn_hidden_size": model.intermediate_size}


def to_hf(tensors: Mapping[str, Tensor], model: Qwen3Config, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    return map_to_hf(tensors, model, vocab_size, lambda layer: {}, lambda layer: SWIGLU)


def from_hf(tensors: Mapping[str, Tensor], model: Qwen3Config) -> Iterator[tuple[str, Tensor]]:
    return map_from_hf(tensors, model, lambda layer: {}, lambda layer: SWIGLU)


def hf_config(model: Qwen3Config) -> dict[str, Any]:
    return hf_attention(model) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": model.intermediate_size,
    }


SPEC = ModelSpec(megatron, layer_spec, to_hf, from_hf, hf_config)
