"""Attention with sinks: the softmax of each query has one score beyond those of its keys, a parameter of the head, and
its value is zero (gpt-oss, arXiv:2508.10925; Xiao et al., 2024, arXiv:2309.17453). So a query may attend to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """q: [batch, heads, queries, dim]; k, v: [batch, kv_heads, keys, dim]; sinks: [heads] -> as q.

    mask: what to add to the scores, [queries, keys] or [batch, heads or 1, queries, keys]; None: causal, with as many
    keys as queries. scale: of the scores; None: 1 / sqrt(dim).
    """
    if q.device.type == "cpu":
        out: Tensor = SinkAttention.apply(q, k, v, sinks, mask, scale)
        return out
    return plain_attention(q, k, v, sinks, mask, scale)


class SinkAttention(torch.autograd.Function):  # type: ignore[misc]
    """By PyTorch's fused kernel for CPUs, which never stores the scores of a whole row.

    The kernel's backward pass computes the probabilities from the log-sum-exp of the scores. With that of scores and
    sink, and the output to match, they and all gradients are those with the sink.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        with_sink = torch.logaddexp(log_sums, sinks.float()[:, None])
        out = out.mul_((log_sums - with_sink).exp_()[..., None])
        ctx.save_for_backward(q, k, v, sinks, mask, out, with_sink)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask, out, with_sink = ctx.saved_tensors
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, with_sink, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
        )
        probability = (sinks.float()[:, None] - with_sink).exp_()
        d_sinks = -(probability * (gradient.float() * out.float()).sum(-1)).sum((0, 2))
        return d_q, d_k, d_v, d_sinks.to(sinks.dtype), None, None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The same by its definition, with all scores in memory, for devices without such a kernel."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=q.device).triu_(1)
    sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
    probabilities = torch.cat((scores + mask, sink), -1).softmax(-1)[..., :-1]
    return probabilities.to(v.dtype) @ v
