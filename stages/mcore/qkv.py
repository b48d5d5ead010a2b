"""Splits an attention layer's fused projection into the queries, keys and values of a kernel, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.mcore import megatron_imports  # noqa: F401 - before Megatron's own names

# isort: split
from megatron.core.transformer import attention


class SelfAttention(attention.SelfAttention):  # type: ignore[misc]
    """Megatron's, with normalization (if the model has it), rotary embedding and the reordering of heads in one step.

    Megatron's own steps copy each head several times, and pass strided heads to the attention kernel.
    """

    def forward(self, hidden: Tensor, attention_mask: Any, *, rotary_pos_emb: Any, **kwargs: Any) -> Any:
        """The output of the attention; `attention_mask` is `starts` of `row_tables.Tables`."""
        if kwargs.get("inference_context") is not None or kwargs.get("packed_seq_params") is not None:
            raise NotImplementedError("a cache of keys and values, or Megatron's own kind of packed rows")
        self.starts = attention_mask
        return super().forward(hidden, attention_mask, rotary_pos_emb=None, **kwargs)

    def get_query_key_value_tensors(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Queries [sequence, batch, heads, dim], keys and values [sequence, batch, kv_heads, dim], of this tensor rank.

        `hidden` is [sequence, batch, hidden]. Each result is a view of [batch, heads, sequence, dim].
        """
        mixed, _ = self.linear_qkv(hidden)
        mixed = mixed.unflatten(2, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        cos, sin = self.config.rows.of(self.starts, mixed.shape[0], mixed.device).rotary
        if not self.config.qk_layernorm:
            heads = rotated_heads(mixed, cos, sin)
        else:
            eps = self.config.layernorm_epsilon
            heads = Heads.apply(mixed, self.q_layernorm.weight, self.k_layernorm.weight, cos, sin, eps)
        return tuple(x.permute(2, 0, 1, 3) for x in heads)


class Heads(torch.autograd.Function):
    """Splits a projection into queries and keys, both RMS-normalized and turned, and values.

    Its input `mixed` is [sequence, batch, groups, queries + 2, dim], a group being its queries, its key, its value;
    `cos` and `sin` are [..., sequence, rotary dim]. Each output is [batch, heads, sequence, dim].

    The arithmetic is fp32 for any type of `mixed`; the result has its type.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        query, key, value = _split_qkv(mixed)
        weights = _to_fp32(q_weight), _to_fp32(k_weight)
        q, q_normed, q_scale = _norm_and_rotate(_to_fp32(query), weights[0], cos, sin, eps)
        k, k_normed, k_scale = _norm_and_rotate(_to_fp32(key), weights[1], cos, sin, eps)
        v = value.contiguous()
        ctx.save_for_backward(q_normed, q_scale, weights[0], k_normed, k_scale, weights[1], cos, sin)
        ctx.shape, ctx.type, ctx.weight_type = mixed.shape, mixed.dtype, q_weight.dtype
        return q.flatten(1, 2).to(mixed.dtype), k.flatten(1, 2).to(mixed.dtype), v.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Any, ...]:
        q_normed, q_scale, q_weight, k_normed, k_scale, k_weight, cos, sin = ctx.saved_tensors
        d_mixed = q_normed.new_empty(ctx.shape, dtype=ctx.type)
        query, key, value = _split_qkv(d_mixed)
        d_q_weight = _norm_and_rotate_backward(_to_fp32(d_q), q_normed, q_scale, q_weight, cos, sin, query)
        d_k_weight = _norm_and_rotate_backward(_to_fp32(d_k), k_normed, k_scale, k_weight, cos, sin, key)
        value.copy_(d_v.unflatten(1, value.shape[1:3]))
        weight_dtype = ctx.weight_type
        return d_mixed, d_q_weight.to(weight_dtype), d_k_weight.to(weight_dtype), None, None, None


def rotated_heads(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As `Heads`, for an attention that does not normalize queries and keys."""
    query, key, value = _split_qkv(mixed)
    return tuple(x.flatten(1, 2) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value.contiguous()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the halves of the first numbers of each head of x, [..., sequence, dim], and leaves the rest.

    They are as many as `cos` and `sin` have, [..., sequence, rotary dim].
    """
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.float().chunk(2, -1)
    turned = (turned.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _to_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _split_qkv(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values, each [batch, groups, heads of a group, sequence, dim]."""
    query, key, value = mixed.permute(1, 2, 3, 0, 4).split((mixed.shape[3] - 2, 1, 1), 2)
    return query, key, value


def _norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, ...]:
    """RMSNorm and rotary embedding of x, [..., sequence, dim], as in `rotate`; then x / RMS, and 1 / RMS."""
    # RMSNorm: x / sqrt(mean(x^2) + eps).
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(x, scale, out=x.new_empty(x.shape))
    turned, half = cos.shape[-1], cos.shape[-1] // 2
    # Weights and cosines are multiplied first: both are small beside the heads.
    out = normed * (_for_heads(cos, x.shape[-1]) * weight)
    out[..., :half].addcmul_(normed[..., half:turned], sin[..., :half] * weight[half:turned], value=-1)
    out[..., half:turned].addcmul_(normed[..., :half], sin[..., half:] * weight[:half])
    return out, normed, scale


def _for_heads(cos: Tensor, dim: int) -> Tensor:
    """With a 1 for each number of a head that does not turn."""
    return cos if cos.shape[-1] == dim else F.pad(cos, (0, dim - cos.shape[-1]), value=1.0)


def _norm_and_rotate_backward(
    d_out: Tensor, normed: Tensor, scale: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, d_x: Tensor
) -> Tensor:
    """Fills d_x and returns the gradient of weight."""
    d_out = d_out.view_as(normed)
    turned, half = cos.shape[-1], cos.shape[-1] // 2
    # The inverse rotation is the rotation by minus the angle.
    d = torch.mul(d_out, _for_heads(cos, normed.shape[-1]), out=torch.empty_like(normed))
    d[..., :half].addcmul_(d_out[..., half:turned], sin[..., half:])
    d[..., half:turned].addcmul_(d_out[..., :half], sin[..., :half], value=-1)
    product = d * normed
    # The gradient of 1 / RMS: the part of d along x, over the width.
    projection = (product @ weight).div_(-weight.numel()).unsqueeze(-1)
    d.mul_(weight).addcmul_(normed, projection)
    if d_x.dtype == d.dtype:
        torch.mul(d, scale, out=d_x)
    else:
        d_x.copy_(d.mul_(scale))
    return product.flatten(0, -2).sum(0)
