"""Which kernels a layer is made of: Transformer Engine's where it is, else PyTorch's. The one place that decides."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stages.model.heads import SelfAttention
from stages.model.mcore import (
    MegatronModule,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
)


def has_transformer_engine() -> bool:
    """Whether layers are made of Transformer Engine's kernels: there is a GPU, and the library."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(config: TransformerConfig, virtual_stage: int | None = None) -> Any:
    """The layer specification that GPTModel is built from, for one virtual pipeline stage of this rank."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=True
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    if config.expert_model_parallel_size * config.expert_tensor_parallel_size == 1:
        # nobody to exchange tokens with: this dispatcher then sorts them once, where "alltoall" copies them twice more
        config.moe_token_dispatcher_type = "allgather"
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.self_attention.module = SelfAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = Attention
    layers = [spec] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]
    """PyTorch's, marked so that its gradient is summed over sequence-parallel ranks (Megatron's local one refuses
    sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal grouped-query attention by PyTorch's fused kernels, which never hold the scores of a whole row.

    Rows are padded on the right, so causality alone keeps padding out of every real position. Under context
    parallelism a rank has slices r and 2C-1-r of the 2C slices of each row, which evens out the work of causal
    attention; it gathers the keys and values of the others.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale, self.context = softmax_scale, config.context_parallel_size

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """q: [sequence, batch, heads, dim]; k, v: [sequence, batch, kv_heads, dim] -> [sequence, batch, heads*dim].

        `sequence` is this rank's share of the row.
        """
        if self.context > 1:
            k, v = GatherSlices.apply(k), GatherSlices.apply(v)
            here = context_positions(k.shape[0])
        else:
            here = torch.arange(q.shape[0])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = causal_attention(q, k, v, here, self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


SLICE = 128
"""Queries that attend in one call."""


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, here: torch.Tensor, scale: float | None, slice_: int = SLICE
) -> torch.Tensor:
    """Attention of the queries at the positions `here` to the keys up to there; q: [batch, heads, len(here), dim].

    A slice of queries sees no keys beyond its last position. The CPU's kernel computes masked scores as well, so that
    spares almost half of the work of long rows.
    """
    out = []
    for queries, at in zip(q.split(slice_, 2), here.split(slice_), strict=True):
        keys = int(at.max()) + 1
        square = keys == len(at)
        mask = None if square else (at[:, None] >= torch.arange(keys)).to(q.device)
        out.append(F.scaled_dot_product_attention(
            queries, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, is_causal=square, scale=scale, enable_gqa=True
        ))  # fmt: skip
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def context_positions(length: int) -> torch.Tensor:
    """The positions of a row of `length` tokens that this context rank holds, in the order in which it holds them."""
    rank = parallel_state.get_context_parallel_rank()
    slices = torch.arange(length).chunk(2 * parallel_state.get_context_parallel_world_size())
    return torch.cat([slices[rank], slices[-1 - rank]])


class GatherSlices(torch.autograd.Function):  # type: ignore[misc]
    """Puts the context ranks' slices of a tensor [share of the sequence, ...] together, in the order of the row.

    Backward: each rank's gradient for the slices that this one holds, summed.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        size = dist.get_world_size(group)
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=group)
        halves = [p.chunk(2) for p in parts]
        return torch.cat([low for low, _ in halves] + [high for _, high in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=group)
        return gradient[context_positions(gradient.shape[0]).to(gradient.device)]
