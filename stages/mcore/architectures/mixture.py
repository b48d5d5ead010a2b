"""The common parts of mixtures of experts in Megatron and in transformers: configuration, and the names of tensors."""

from __future__ import annotations

from typing import Any

from stages.models.mixture import RoutedConfig, SigmoidMixtureConfig


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


def megatron_sigmoid_experts(model: SigmoidMixtureConfig) -> dict[str, Any]:
    """As `megatron_experts`, of the whole feed-forward part."""
    return {
        "ffn_hidden_size": model.intermediate_size or model.moe_intermediate_size,
        **megatron_experts(model),
        "moe_shared_expert_intermediate_size": model.shared_width,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": model.n_group if model.n_group > 1 else None,
        "moe_router_group_topk": model.topk_group if model.n_group > 1 else None,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
    }


def hf_sigmoid_experts(model: SigmoidMixtureConfig) -> dict[str, Any]:
    """Entries of config.json: no layer predicts further tokens."""
    return {
        "first_k_dense_replace": model.dense_layers,
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size * model.num_experts_per_tok,
        "moe_intermediate_size": model.moe_intermediate_size,
        "n_group": model.n_group,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.n_shared_experts,
        "norm_topk_prob": True,
        "num_experts_per_tok": model.num_experts_per_tok,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": model.routed_scaling_factor,
        "topk_group": model.topk_group,
    }


def sigmoid_router(model: SigmoidMixtureConfig, layer: int) -> dict[str, str]:
    """Megatron's names of the tensors of a layer's router, and transformers'."""
    names = {"router.weight": "gate.weight", "router.expert_bias": "gate.e_score_correction_bias"}
    return (
        {}
        if layer < model.dense_layers
        else {f"mlp.{megatron_name}": f"mlp.{hf_name}" for megatron_name, hf_name in names.items()}
    )


def sigmoid_swiglus(model: SigmoidMixtureConfig, layer: int) -> list[tuple[str, str]]:
    """(Megatron's, transformers') prefixes of a layer's SwiGLUs."""
    if layer < model.dense_layers:
        return [("mlp.", "mlp.")]
    return [("mlp.shared_experts.", "mlp.shared_experts."), *expert_swiglus(model)]
