"""Rotary frequencies of a model, with YaRN's scaling (Peng et al., 2023) where the recipe asks for it.

Position p turns the pair (i, i + dim/2) of a head by p * frequency[i] (Su et al., 2021; the halves of a head turn).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stages.models.base import ModelConfig


def frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """(radians by position, [rotary_dim / 2], fp32; the factor of cosines and sines)."""
    dim = model.rotary_dim
    base = 1.0 / (model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if model.yarn is None:
        return base, 1.0
    yarn = model.yarn

    def pair_index(rotations: float) -> float:
        """The (fractional) pair whose frequency makes that many turns within the original length."""
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    low, high = max(math.floor(pair_index(yarn.beta_fast)), 0), min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
    width = high - low or 0.001  # equal ends turn the ramp into a step
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / width, 0, 1)
    factor = 1.0 if model.yarn_scales_heads else yarn_factor(model)
    return base / yarn.factor * ramp + base * (1 - ramp), factor


def yarn_factor(model: ModelConfig) -> float:
    """The factor of queries and of keys."""
    return 0.1 * math.log(model.yarn.factor) + 1.0 if model.yarn else 1.0


def megatron_yarn(model: ModelConfig) -> dict[str, Any]:
    """Attributes of Megatron's configuration with which its own attention layers scale in the same way."""
    if model.yarn is None:
        return {}
    return {
        "yarn_rotary_scaling_factor": model.yarn.factor,
        "yarn_original_max_position_embeddings": model.yarn.original_length,
        "yarn_beta_fast": model.yarn.beta_fast,
        "yarn_beta_slow": model.yarn.beta_slow,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
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
