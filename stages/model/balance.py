"""The load-balancing loss that Megatron's routers keep on the side for logging."""

from __future__ import annotations

import torch

from stages.model.mcore import moe_utils


def _kept() -> dict[str, torch.Tensor]:
    """Name -> this rank's sums by layer since the last `forget`; 0.17 moved them into an object."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return {name: entry.values for name, entry in moe_utils.get_moe_metrics_tracker().metrics.items()}
    return {name: entry["values"] for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items()}


def take() -> torch.Tensor:
    """This rank's part of the sum over layers, tokens and micro-batches since the last call: a scalar, without the
    loss weight."""
    values = list(_kept().values())
    total = torch.stack([v.sum() for v in values]).sum() if values else torch.zeros(())
    for v in values:
        v.zero_()
    return total


def forget() -> None:
    """Drops the record: Megatron sizes it by the first model of the process, and the next one may be deeper."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        moe_utils.get_moe_metrics_tracker().metrics.clear()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
