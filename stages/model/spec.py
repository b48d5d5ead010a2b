"""Which kernels a layer is made of: Transformer Engine's on GPU, PyTorch's on CPU. The one place that decides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stages.model.mcore import (
    MegatronModule,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
)


def layer_spec(config: TransformerConfig) -> Any:
    """The layer specification that GPTModel is built from."""
    if torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=True
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = Attention
    layers = [spec] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]
    """PyTorch's, marked so that its gradient is summed over sequence-parallel ranks (Megatron's local one refuses
    sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal grouped-query attention by PyTorch's fused kernel: about twice the speed of Megatron's unfused one.

    Rows are padded on the right, so causality alone keeps padding out of every real position.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism without Transformer Engine")
        self.scale = softmax_scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """q: [sequence, batch, heads, dim]; k, v: [sequence, batch, kv_heads, dim] -> [sequence, batch, heads*dim]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)
