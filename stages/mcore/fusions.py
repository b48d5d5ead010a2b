"""The fused kernels and CUDA graphs of a layout: Megatron's words for each, and whether this machine has it."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.core.errors import RecipeError
from stages.mcore import gpu
from stages.models.parallel_layout import Fusion, Layout

FUSIONS: dict[Fusion, tuple[dict[str, Any], str, str]] = {
    # Megatron's settings; the name in Megatron that is there with the kernel; what that takes
    "permute": (
        {"moe_permute_fusion": True},
        "transformer.moe.moe_utils.fused_permute",
        "Transformer Engine 2.1",
    ),
    "router": (
        {"moe_router_fusion": True},
        "transformer.moe.moe_utils.fused_topk_with_score_function",
        "Transformer Engine 2.7",
    ),
    "cross_entropy": (
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
        "models.common.language_module.language_module.te_parallel_cross_entropy",
        "Transformer Engine",
    ),
    "rope": (  # in rows of one document; those of several have a kernel of this project
        {"apply_rope_fusion": True},
        "models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb",
        "Transformer Engine",
    ),
    "bias_activation": ({"bias_activation_fusion": True}, "", "a GPU"),
    "gradient_accumulation": (
        {"gradient_accumulation_fusion": True},
        "tensor_parallel.layers._grad_accum_fusion_available",
        "Apex with its extension fused_weight_gradient_mlp_cuda",
    ),
}
"""Those that NVIDIA's recipes of mixtures of experts use. Without one, the same is several kernels of PyTorch."""


def keywords(layout: Layout, engine: bool, experts: bool) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig. engine: layers are Transformer Engine's; experts: there are
    some.

    Raises RecipeError if the layout names a kernel that is missing here; without names it takes those that are there.
    """
    if layout.cuda_graphs and gpu.device().type != "cuda":
        raise RecipeError("parallelism.cuda_graphs = true needs a GPU, which this phase lacks here; leave it out")
    chosen: dict[str, Any] = {"cuda_graph_impl": "local" if layout.cuda_graphs else "none"}  # of complete layers
    chosen |= {"bias_dropout_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False}
    for fusion, (settings, place, needs) in FUSIONS.items():
        has_kernel = gpu.device().type == "cuda" and (engine or fusion == "bias_activation") and _is_there(place)
        if layout.fusions and fusion in layout.fusions and not has_kernel:
            raise RecipeError(f"parallelism.fusions = {fusion} needs {needs}, layers in bf16 or FP8, and a GPU, which "
                              f"this phase lacks here; leave it out")  # fmt: skip
        wanted = layout.fusions is None or fusion in layout.fusions
        applies = experts or fusion not in ("permute", "router")
        is_on = wanted and has_kernel and applies and not (layout.deterministic and fusion == "cross_entropy")
        chosen |= {name: is_on if value is True else value for name, value in settings.items()}
    return chosen


def _is_there(place: str) -> bool:
    """Whether a name of Megatron, module and all, has a value that is neither None nor false."""
    module, _, name = place.rpartition(".")
    return not place or bool(getattr(importlib.import_module(f"megatron.core.{module}"), name, None))
