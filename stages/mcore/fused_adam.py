"""PyTorch's fused AdamW and norm of many tensors with the interfaces of Transformer Engine's, which Megatron expects.

The step count is in the parameter group, not in each parameter's state, and a checkpoint restores it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):  # type: ignore[misc]
    """Decoupled weight decay (AdamW) unless `adam_w_mode` is false; one fused kernel call for each group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: Any,  # FusedAdam's switches for CUDA graphs and low-precision states
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        if not bias_correction:
            raise NotImplementedError("Adam without bias correction")
        self.fused = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None, **_: Any) -> None:
        for group in self.param_groups:
            # One count for the group, so that a resumed step has the same bias correction on every layout.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            self.fused(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.full((), float(group["step"]), device=params[0].device)] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install() -> None:
    """Installs both if Megatron finds neither Transformer Engine's nor Apex's."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        # Megatron would otherwise build torch.optim's class, with other arguments.
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
    # Only in place of Megatron's fallback, not of the kernels of Transformer Engine and Apex.
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = total_norm


def total_norm(_: int, __: Any, tensors: list[list[Tensor]], ___: bool) -> tuple[Tensor, None]:
    """The norm of all tensors of a list as one number, [1]. Megatron's own reads the norm of each tensor on the host,
    which then waits for a GPU as often as there are tensors."""
    return torch.nn.utils.get_total_norm(tensors[0]).view(1), None
