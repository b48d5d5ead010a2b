"""What differs between the versions of megatron-core that we support, 0.16.1 to 0.19: the one file that knows.

Everything else is written for names that all of them have. Tests run with the oldest (Python 3.11) and the newest
(`make test-latest`).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch


def before_import() -> None:
    """Without CUDA, from 0.17 on: the schedules load a GPU kernel written in Triton, which CPU builds of PyTorch come
    without. It gets a stand-in, which can be imported and not called."""
    kernel = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(kernel, _Absent(kernel))


def after_import() -> None:
    """0.16: the router's matrix product looks up a kernel's name that is only defined where Transformer Engine is."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def balance_losses() -> list[torch.Tensor]:
    """This rank's load-balancing losses by layer, summed since they were last set to zero; 0.17 moved them into an
    object."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return [entry.values for entry in moe_utils.get_moe_metrics_tracker().metrics.values()]
    return [entry["values"] for entry in moe_utils.get_moe_layer_wise_logging_tracker().values()]


def forget_balance() -> None:
    """Drops that record, whose length is that of the process's first model."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        moe_utils.get_moe_metrics_tracker().metrics.clear()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


class _Absent(types.ModuleType):
    """A module of kernels that cannot be called here: importing a name from it works, using it does not."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
