"""The common parts of mixtures of experts in Megatron and in transformers: configuration, and the names of tensors."""

from __future__ import annotations

from typing import Any

from stages.models.mixture import RoutedConfig


def megatron_experts(model: RoutedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig."""
    return {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_layer_freq": [int(layer in model.routing.layers) for layer in range(model.layers)],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": {"batch": "aux_loss", "sequence": "seq_aux_loss"}[model.balance],
        "moe_aux_loss_coeff": model.aux_loss,
        "moe_z_loss_coeff": model.z_loss or None,
    }


def expert_swiglus(model: RoutedConfig) -> list[tuple[str, str]]:
    """(Megatron's, transformers') prefixes of the SwiGLUs that are the experts of a layer."""
    return [(f"mlp.experts.local_experts.{e}.", f"mlp.experts.{e}.") for e in range(model.experts)]
