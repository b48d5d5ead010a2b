"""The precision of a phase: Megatron's configuration for it, and the hardware and packages that it needs.

In every precision the optimizer's weights and moments, gradient sums over micro-batches and ranks, the router, the
norms' arithmetic and the loss are fp32. The FP8 and FP4 ones are Transformer Engine's recipes around bf16 weights;
embeddings, output head, router and attention's products stay in bf16 or fp32, and in FP4 the last layers stay in bf16.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from stages.mcore import megatron_patches
from stages.mcore.layer_spec import has_transformer_engine
from stages.models.base import Precision, layers_in_bf16

# Of each format of 8 or 4 bits: the first GPU generation whose tensor cores support it, and Transformer Engine's answer
# whether this machine does, which also depends on the versions of CUDA and its libraries.
QUANTIZED: dict[Precision, tuple[str, str]] = {
    "fp8-tensorwise": ("Ada or Hopper", "is_fp8_available"),
    "fp8-blockwise": ("Hopper", "is_fp8_block_scaling_available"),
    "mxfp8": ("Blackwell", "is_mxfp8_available"),
    "nvfp4": ("Blackwell", "is_nvfp4_available"),
}
_BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
_RECIPES: dict[Precision, dict[str, Any]] = {
    # e4m3 forward, e5m2 for gradients, one scale per tensor from its present maximum
    "fp8-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # e4m3 everywhere; scales by 1 x 128 of activations and gradients, 128 x 128 of weights (DeepSeek-V3)
    "fp8-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    # e4m3 everywhere; scales that are powers of two, by 1 x 32 (OCP Microscaling)
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    # e2m1 everywhere; e4m3 scales by 1 x 16 of activations and gradients, 16 x 16 of weights, under one of the tensor;
    # stochastic rounding of gradients and the Hadamard transform are on by default (NVIDIA, arXiv:2509.25149)
    "nvfp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
}


def keywords(precision: Precision, layers: int = 1) -> dict[str, Any]:
    """The keyword arguments of Megatron's TransformerConfig; constructing it with the FP8 and FP4 ones needs
    Transformer Engine. Weights stay bf16 under them and are quantized as they are used. layers: of the model."""
    if precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    words = {**_BF16, **_RECIPES.get(precision, {})}
    if precision == "nvfp4":
        words |= {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0}
        words["num_layers_at_end_in_bf16"] = layers_in_bf16(precision, layers)
    return words


def missing_requirement(precision: Precision) -> str | None:
    """The requirement of a precision that this machine lacks, in a sentence that begins with the recipe's field, or
    None."""
    requirement = f"precision = {precision} needs"
    if precision == "bf16" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"{requirement} a GPU of the Ampere generation or newer, and this one is older; choose fp32"
    if precision not in QUANTIZED:
        return None
    if megatron_patches.te_on_cpu():
        return None
    generation, question = QUANTIZED[precision]
    if not torch.cuda.is_available():
        return (
            f"{requirement} a GPU of the {generation} generation or newer and Transformer Engine, and this machine "
            f"has no GPU; `atom simulate-precision` shows here what the format does to the loss"
        )
    if not has_transformer_engine():
        return f"{requirement} Transformer Engine, which cannot be imported here; install transformer-engine[pytorch]"
    available, reason = getattr(importlib.import_module("transformer_engine.pytorch"), question)(return_reason=True)
    if not available:
        return f"{requirement} what this machine lacks, says Transformer Engine: {reason.strip(' .')}; choose bf16"
    return None
