"""The precision of a phase: Megatron's configuration for it, and the hardware and packages that it needs.

In every precision the optimizer's weights and moments, gradient sums over micro-batches and ranks, the router, the
norms' arithmetic and the loss are fp32. The FP8 ones are Transformer Engine's recipes around bf16 weights; embeddings,
output head, router and attention's products stay in bf16 or fp32.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from stages.mcore import megatron_cpu_patches
from stages.models.base import Precision

# The first GPU generation whose tensor cores support the format, as compute capability and by name.
NEEDS: dict[Precision, tuple[tuple[int, int], str]] = {
    "bf16": ((8, 0), "Ampere"),
    "fp8-tensorwise": ((8, 9), "Ada or Hopper"),
    "fp8-blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}
_BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
_FP8: dict[Precision, dict[str, Any]] = {
    # e4m3 forward, e5m2 for gradients, one scale per tensor from its present maximum
    "fp8-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # e4m3 everywhere; scales by 1 x 128 of activations and gradients, 128 x 128 of weights (DeepSeek-V3)
    "fp8-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    # e4m3 everywhere; scales that are powers of two, by 1 x 32 (OCP Microscaling)
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}


def keywords(precision: Precision) -> dict[str, Any]:
    """The keyword arguments of Megatron's TransformerConfig; constructing it with the FP8 ones needs Transformer
    Engine. Weights stay bf16 under FP8 and are quantized as they are used."""
    if precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    return {**_BF16, **_FP8.get(precision, {})}


def missing_requirement(precision: Precision) -> str | None:
    """The requirement of a precision that this machine lacks, in a sentence that begins with the recipe's field, or
    None."""
    requirement = f"precision = {precision} needs"
    if precision not in NEEDS or (precision == "bf16" and not torch.cuda.is_available()):
        return None
    if megatron_cpu_patches.te_on_cpu():
        return None
    (capability, generation), is_fp8 = NEEDS[precision], precision in _FP8
    if not torch.cuda.is_available():
        return (f"{requirement} a GPU of the {generation} generation or newer and Transformer Engine, and this machine "
                f"has no GPU; `atom simulate-precision` shows here what the format does to the loss")  # fmt: skip
    if is_fp8 and importlib.util.find_spec("transformer_engine") is None:
        return f"{requirement} Transformer Engine, which is not installed here; install transformer-engine[pytorch]"
    device_capability = torch.cuda.get_device_capability()
    if device_capability < capability:
        return (f"{requirement} a GPU of the {generation} generation or newer (compute capability {capability[0]}."
                f"{capability[1]}), and this one has {device_capability[0]}.{device_capability[1]}; "
                "choose bf16")  # fmt: skip
    return None
