"""A rank's experts in one step: no expert's rows are copied apart or together, forward or backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stages.model.mcore import tensor_parallel  # first: it brings the CPU support

# isort: split
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP


class Experts(SequentialMLP):  # type: ignore[misc]
    """Megatron's SequentialMLP, its parameters and its checkpoints, with another forward.

    The linear layers of experts communicate nothing: dispatchers gather and scatter around them, in every layout.
    """

    def __init__(self, experts: int, config: Any, **rest: Any) -> None:
        column, row = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
        linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
        super().__init__(experts, config, submodules=linears, **rest)

    def forward(
        self, rows: torch.Tensor, rows_by_expert: torch.Tensor, weights: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """rows: [rows, hidden], sorted by expert; rows_by_expert: [experts]; weights: the router's, [rows].

        Gives [rows, hidden], times the weights.
        """
        matrices = [getattr(e, linear).weight for linear in ("linear_fc1", "linear_fc2") for e in self.local_experts]
        return SwiGLU.apply(rows, weights, rows_by_expert.tolist(), *matrices), None


class SwiGLU(torch.autograd.Function):  # type: ignore[misc]
    """weight * (silu(x @ gate.T) * (x @ up.T)) @ down.T for each expert's rows.

    Expert by expert, so that what is between the products stays in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, counts: list[int], *matrices: torch.Tensor
    ) -> torch.Tensor:
        experts = len(counts)
        inner = x.new_empty(len(x), matrices[0].shape[0])  # gate beside up
        out = torch.empty_like(x)
        for x_, h, o, w, fc1, fc2 in zip(
            *(t.split(counts) for t in (x, inner, out, weights.unsqueeze(1))),
            matrices[:experts], matrices[experts:], strict=True,
        ):  # fmt: skip
            torch.mm(x_, fc1.t(), out=h)
            gate, up = h.chunk(2, 1)
            torch.mm(F.silu(gate).mul_(up).mul_(w), fc2.t(), out=o)
        ctx.counts = counts
        ctx.save_for_backward(x, weights, inner, *matrices)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weights, inner, *matrices = ctx.saved_tensors
        experts = len(ctx.counts)
        d_x, d_weights = torch.empty_like(x), torch.empty_like(weights)
        d_fc1, d_fc2 = [], []
        gradient = gradient.contiguous()
        for x_, h, g, w, d_x_, d_w, fc1, fc2 in zip(
            *(t.split(ctx.counts) for t in (x, inner, gradient, weights.unsqueeze(1), d_x, d_weights)),
            matrices[:experts], matrices[experts:], strict=True,
        ):  # fmt: skip
            gate, up = h.chunk(2, 1)
            swish = F.silu(gate)
            d_product = g.mm(fc2)  # of the loss by weight * swish * up
            product = swish * up
            torch.sum(product * d_product, 1, out=d_w)
            d_fc2.append(g.t().mm(product.mul_(w)))
            d_product.mul_(w)
            d_h = torch.empty_like(h)
            d_gate, d_up = d_h.chunk(2, 1)
            torch.mul(d_product, swish, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
            d_fc1.append(d_h.t().mm(x_))
            torch.mm(d_h, fc1, out=d_x_)
        return d_x, d_weights, None, *d_fc1, *d_fc2
