"""The load-balancing loss that Megatron's routers keep on the side for logging."""

from __future__ import annotations

import torch

import stages.model.mcore  # noqa: F401  the CPU support comes before any of Megatron's names
from stages.model import versions


def take() -> torch.Tensor:
    """This rank's part of the sum over layers, tokens and micro-batches since the last call: a scalar, without the
    loss weight."""
    values = versions.balance_losses()
    total = torch.stack([v.sum() for v in values]).sum() if values else torch.zeros(())
    for v in values:
        v.zero_()
    return total


def forget() -> None:
    """Drops the record: Megatron sizes it by the first model of the process, and the next one may be deeper."""
    versions.forget_balance()
