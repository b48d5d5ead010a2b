"""The kernels of a layer: Transformer Engine's if available, else PyTorch's. Only this file decides."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stages.mcore import megatron_cpu_patches
from stages.mcore.megatron_imports import (
    MegatronModule,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    parallel_state,
)
from stages.mcore.qkv import SelfAttention, context_positions
from stages.models.grouped_query import SLICE


def has_transformer_engine() -> bool:
    """Whether layers use Transformer Engine's kernels: a GPU and the library are available."""
    if megatron_cpu_patches.te_on_cpu():
        return True
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(config: TransformerConfig, virtual_stage: int | None = None, packed: bool = False) -> Any:
    """The layer specification of GPTModel, for one virtual pipeline stage of this rank.

    packed: attention must separate the documents of a row; this project's does, also between Transformer Engine's
    matrices.
    """
    engine = has_transformer_engine()
    if not engine and config.expert_model_parallel_size * config.expert_tensor_parallel_size == 1:
        # no rank to exchange tokens with: this dispatcher then sorts them once, where "alltoall" copies them twice more
        config.moe_token_dispatcher_type = "allgather"

    def layer(experts: int | None) -> Any:
        if engine:
            spec = get_gpt_layer_with_transformer_engine_spec(
                num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
            )
        else:
            spec = get_gpt_layer_local_spec(
                num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
            )
            attention = spec.submodules.self_attention.submodules
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if packed or not engine:
            spec.submodules.self_attention.module = SelfAttention
            spec.submodules.self_attention.submodules.core_attention = Attention
        return spec

    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    frequencies = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    kinds = frequencies[first : first + get_num_layers_to_build(config, vp_stage=virtual_stage)]
    specs = {kind: layer(config.num_moe_experts if kind else None) for kind in set(kinds)}
    norm: Any = RMSNorm
    if engine:
        from megatron.core.extensions import transformer_engine

        norm = transformer_engine.TENorm
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]
    """PyTorch's, marked so that its gradient is summed over sequence-parallel ranks (Megatron's local one refuses
    sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal grouped-query attention with PyTorch's fused kernels, which never store the scores of a whole row.

    Rows are padded on the right, so causality alone masks padding for every real position. Under context parallelism a
    rank has slices r and 2C-1-r of the 2C slices of each row, which evens out the work of causal attention; it gathers
    the keys and values of the others. In packed rows, Megatron's attention mask argument
    holds the first position of the document of each position: int64 [batch, complete row].
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale, self.context = softmax_scale, config.context_parallel_size

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        """q: [sequence, batch, heads, dim]; k, v: [sequence, batch, kv_heads, dim] -> [sequence, batch, heads*dim].

        `sequence` is this rank's share of the row.
        """
        if self.context > 1:
            k, v = GatherSlices.apply(k), GatherSlices.apply(v)
            positions = context_positions(k.shape[0])
        else:
            positions = torch.arange(q.shape[0])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = causal_attention(q, k, v, positions, self.scale, starts=None if starts is None else starts[:, positions])
        return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float | None,
    slice_: int = SLICE, starts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the queries at `positions` to the keys up to there; q: [batch, heads, len(positions), dim].

    starts: [batch, len(positions)], the first key that each query sees; None: position 0.
    A slice of queries sees no keys beyond its last position, and none before its first document. The CPU's kernel also
    computes masked scores, so this saves almost half of the work of long rows.
    """
    out = []
    slice_starts = starts.split(slice_, 1) if starts is not None else [None] * len(positions.split(slice_))
    for queries, slice_positions, slice_start in zip(
        q.split(slice_, 2), positions.split(slice_), slice_starts, strict=True
    ):
        first, keys = 0 if slice_start is None else int(slice_start.min()), int(slice_positions.max()) + 1
        is_causal = slice_start is None and keys == len(slice_positions)
        mask = None
        if not is_causal:
            key = torch.arange(first, keys)
            mask = (slice_positions[:, None] >= key).to(q.device)
            if slice_start is not None:
                mask = (mask & (slice_start[:, :, None] <= key.to(q.device)))[:, None]
        out.append(F.scaled_dot_product_attention(
            queries, k[:, :, first:keys], v[:, :, first:keys], attn_mask=mask, is_causal=is_causal, scale=scale,
            enable_gqa=True,
        ))  # fmt: skip
    return out[0] if len(out) == 1 else torch.cat(out, 2)


class GatherSlices(torch.autograd.Function):  # type: ignore[misc]
    """Gathers the context ranks' slices of a tensor [share of the sequence, ...] in the order of the row.

    Backward: each rank's gradient for the slices that this one holds, summed.
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        size = dist.get_world_size(group)
        gathered = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(gathered, local.contiguous(), group=group)
        halves = [p.chunk(2) for p in gathered]
        return torch.cat([low for low, _ in halves] + [high for _, high in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=group)
        return gradient[context_positions(gradient.shape[0]).to(gradient.device)]
