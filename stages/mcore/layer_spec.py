"""The kernels of a layer: Transformer Engine's if available, else PyTorch's. Only this file decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.mcore import megatron_compat, megatron_patches
from stages.mcore.megatron_imports import (
    MLP,
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    SequentialMLP,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    gpt_layer_specs,
    parallel_state,
    tensor_parallel,
)
from stages.mcore.qkv import SelfAttention
from stages.mcore.row_tables import Documents, Tables


def has_transformer_engine() -> bool:
    """Returns True if Megatron has imported Transformer Engine's kernels, which it cannot without a GPU."""
    return bool(gpt_layer_specs.HAVE_TE)


def uses_transformer_engine(params_dtype: torch.dtype) -> bool:
    """Returns True if the layers of a model use Transformer Engine.

    In fp32 they never do: its products are then in TF32, which keeps ten bits of each factor.
    """
    return has_transformer_engine() and (params_dtype != torch.float32 or megatron_patches.te_on_cpu())


def layer_spec(config: TransformerConfig, virtual_stage: int | None = None, packed: bool = False) -> Any:
    """The layer specification of GPTModel, for one virtual pipeline stage of this rank.

    packed: attention must separate the documents of a row; this project's does, also between Transformer Engine's
    matrices. So does its rotary embedding of a part of each head, which Megatron's YaRN does not know.
    """
    engine = uses_transformer_engine(config.params_dtype)
    # One frequency turns two numbers of a head.
    is_partial = 2 * len(config.rows.rope[0]) < config.kv_channels
    if not engine and config.expert_model_parallel_size * config.expert_tensor_parallel_size == 1:
        # no rank to exchange tokens with: this dispatcher then sorts them once, where "alltoall" copies them twice more
        config.moe_token_dispatcher_type = "allgather"

    def layer(experts: int | None) -> Any:
        if engine:
            spec = get_gpt_layer_with_transformer_engine_spec(
                num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
            )
            if config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules:
                _separate_norms(spec.submodules, is_dense=experts is None)
        else:
            spec = get_gpt_layer_local_spec(
                num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
            )
            attention = spec.submodules.self_attention.submodules
            # Megatron's local norm refuses sequence parallelism.
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if packed or is_partial or not engine:
            spec.submodules.self_attention.module = SelfAttention
            # Its kernel for rows of several documents takes no parts of rows.
            has_kernel = engine and config.context_parallel_size == 1
            spec.submodules.self_attention.submodules.core_attention = EngineAttention if has_kernel else Attention
        return spec

    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    frequencies = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    # The layers of this virtual stage only: a rank builds no others.
    kinds = frequencies[first : first + get_num_layers_to_build(config, vp_stage=virtual_stage)]
    specs = {kind: layer(config.num_moe_experts if kind else None) for kind in set(kinds)}
    norm: Any = RMSNorm
    if engine:
        from megatron.core.extensions import transformer_engine

        norm = transformer_engine.TENorm
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


def _separate_norms(layer: Any, is_dense: bool) -> None:
    """Takes the norms out of Transformer Engine's linear layers, which would keep what these norms return."""
    from megatron.core.extensions import transformer_engine as te

    layer.input_layernorm = te.TENorm
    layer.self_attention.submodules.linear_qkv = te.TEColumnParallelLinear
    if is_dense:  # experts have a norm of their own
        layer.pre_mlp_layernorm = te.TENorm
        megatron_compat.mlp_submodules(layer.mlp).linear_fc1 = te.TEColumnParallelLinear


def recompute_activations(chunk: Any) -> None:
    """Lets local experts compute their SwiGLU again in the backward pass, as Megatron lets grouped ones."""
    for module in chunk.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                expert.__class__ = RecomputedExpert


class RecomputedExpert(MLP):  # type: ignore[misc]
    """A local expert that keeps gate and up, and neither their product nor what it is made of."""

    def forward(self, tokens: Tensor, per_token_scale: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The output for `tokens` [tokens, hidden], weighted by `per_token_scale` [tokens]."""
        checkpoint = tensor_parallel.CheckpointWithoutOutput()
        weighted = checkpoint.checkpoint(_weighted_swiglu, self.linear_fc1(tokens)[0], per_token_scale)
        output, _ = self.linear_fc2(weighted)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None


def _weighted_swiglu(gate_and_up: Tensor, scale: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return (F.silu(gate) * up * scale[:, None]).to(gate.dtype)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's norm, marked so that its gradient is summed over sequence-parallel ranks.

    Megatron's local one refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # Each tensor rank normalizes its share of the tokens, so the gradient is a sum over them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal grouped-query attention with PyTorch's fused kernels, which never store the scores of a whole row.

    Rows are padded on the right, so causality alone masks padding for every real position. Under context parallelism a
    rank has slices r and 2C-1-r of the 2C slices of each row, which evens out the work of causal attention; it gathers
    the keys and values of the others. In packed rows, Megatron's attention mask argument
    holds the first position of the document of each position: int64 [batch, complete row], on the host; or
    [3, batch, complete row] with the ends of its prefix, which several documents of a row may share.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """The output of this tensor rank's heads, [sequence, batch, heads*dim].

        `q` is [sequence, batch, heads, dim], `k` and `v` are [sequence, batch, kv_heads, dim]. `sequence` is this
        rank's share of the row.
        """
        tables = self.config.rows.of(starts, q.shape[0], q.device)
        if self.config.context_parallel_size > 1:
            # Queries stay where they are; each rank needs the keys and values of the whole row.
            k, v = GatherSlices.apply(k), GatherSlices.apply(v)
        if tables.prefixes is not None and not Attention.takes_documents(self, q):
            return self.by_buckets(q, k, v, tables)
        if not self.takes_documents(q):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            out = causal_attention(q, k, v, tables, self.scale)
            return out.permute(2, 0, 1, 3).flatten(2)
        batch = q.shape[1]
        documents = tables.documents(batch)
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        if documents.gathered is not None:
            k, v = (x.index_select(0, documents.gathered) for x in (k, v))
        # a kernel lays its output out as its queries: token by token, a row's is no second tensor for the projection
        out = self.attend(q.contiguous(), k, v, documents)
        rows: torch.Tensor = out.flatten(1).unflatten(0, (batch, -1))
        return rows.transpose(0, 1).contiguous()

    def takes_documents(self, q: Tensor) -> bool:
        """Returns True if `attend` has a kernel for these queries, forward and backward."""
        return q.is_cuda and fits_flash_attention(q) and varlen_kernel() is not None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Attention of documents side by side; q, k, v and the result are [tokens of all rows, heads, dim]."""
        kernel = varlen_kernel()
        assert kernel is not None
        ends = (documents.queries, documents.keys, documents.longest, documents.longest)
        # Causal: a query sees all keys before its own one, for which -1 stands, and none after it.
        attended: Tensor = kernel(q, k, v, *ends, scale=self.scale, window_size=(-1, 0))
        return attended

    def by_buckets(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """Attention of documents that share prefixes, by batches of like length; shapes as in `forward`."""
        length, batch = q.shape[:2]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))  # [tokens of all rows, heads, dim]
        # Documents of one bucket have lengths within a factor of two, which bounds the padding.
        buckets, place = tables.buckets(batch, q.dtype)
        out = []
        for bucket in buckets:
            queries, keys, values = (
                x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
                for x, index in ((q, bucket.queries), (k, bucket.keys), (v, bucket.keys))
            )
            attended = attend(queries, keys, values, bucket.mask, self.scale)
            out.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        attended_rows: Tensor = torch.cat(out).index_select(0, place).unflatten(0, (batch, length))
        return attended_rows.transpose(0, 1).contiguous()


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's attention for rows of variable length, with grouped queries; None before PyTorch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    # 2.11 takes fewer keys than queries as they come; later it wants to be told
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


def fits_flash_attention(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


class EngineAttention(Attention):
    """The same by Transformer Engine's kernels for rows of variable length, on one context rank.

    Documents with a prefix have fewer queries than keys, and go by PyTorch's.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, layer_number: int = 1, **settings: Any
    ) -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        super().__init__(config, softmax_scale)
        self.kernel = TEDotProductAttention(
            config=config, layer_number=layer_number, softmax_scale=softmax_scale, **settings
        )

    def takes_documents(self, q: Tensor) -> bool:
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        if documents.gathered is not None:
            return super().attend(q, k, v, documents)
        rows = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=documents.queries,
            cu_seqlens_kv=documents.keys,
            max_seqlen_q=documents.longest,
            max_seqlen_kv=documents.longest,
        )
        out: Tensor = self.kernel(q, k, v, None, AttnMaskType.padding_causal, packed_seq_params=rows)
        return out.view_as(q)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float | None) -> Tensor:
    """Attention by slices of queries; q: [batch, heads, this rank's share of a row, dim]; k, v: of complete rows."""
    out, slices = [], tables.slices
    for number, queries in enumerate(q.split([count for count, _, _ in slices], 2)):
        _, first, end = slices[number]
        keys, values = (x[:, :, first:end] for x in (k, v))
        out.append(attend(queries, keys, values, tables.mask(number, q.dtype), scale))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One call of a kernel.

    `q` and the result are [batch, heads, queries, dim], `k` and `v` are [batch, kv_heads, keys, dim]. `mask` is added
    to the scores, [queries, keys] or [batch, heads or 1, queries, keys]; None means causal, with as many keys as
    queries. `scale` multiplies the scores; None means 1 / sqrt(dim).
    """
    # Copies of the keys for each query head are cheaper than the scores that PyTorch would store.
    if not (shares := shares_keys(q, mask)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shares
    )


def shares_keys(q: Tensor, mask: Tensor | None) -> bool:
    """Returns True if PyTorch's kernel for these queries takes fewer heads of keys than of queries.

    Flash attention and the CPU's kernel do. The one of a GPU for fp32 and for masks does not, and PyTorch would store
    the scores of all heads instead.
    """
    return not q.is_cuda or (mask is None and fits_flash_attention(q))


class GatherSlices(torch.autograd.Function):
    """Gathers the context ranks' slices of a tensor [share of the sequence, ...] in the order of the row.

    Backward: each rank's gradient for the slices that this one holds, summed.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        size = dist.get_world_size(group)
        gathered = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
        # Collective among the context ranks. Megatron exchanges parts in a ring by Transformer Engine, which is not
        # always there.
        dist.all_gather(gathered, local.contiguous(), group=group)
        # Each rank has a slice from the front and one as far from the end: back into the order of the row.
        halves = [p.chunk(2) for p in gathered]
        return torch.cat([low for low, _ in halves] + [high for _, high in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        # Autograd may use the tensor elsewhere, and the sum is in place.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        # Every rank has gradients for all keys: their sum, of which each keeps its own slices.
        dist.all_reduce(gradient, group=group)
        slices = gradient.chunk(2 * dist.get_world_size(group))
        rank = dist.get_rank(group)
        return torch.cat([slices[rank], slices[-1 - rank]])
