"""The GPU of a rank: which one it is, and PyTorch's switches. Without CUDA, nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.mcore import gpu_environment
from stages.models.parallel_layout import Layout

BACKEND = "nccl"
"""torch.distributed's backend with GPUs, of the default group and of each of Megatron's."""


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(layout: Layout | None = None) -> torch.device:
    """The device of this process, before its first tensor is there. layout: of the rank; None: one GPU.

    Raises AtomError if it is a GPU and the process was started without the variables of the layout.
    """
    if torch.cuda.is_available():
        gpu_environment.require(layout)
    return device()


def number(local_rank: int, visible: int) -> int:
    """The GPU of a rank among those that it sees: `local_rank`, or the only one if each task sees just its own."""
    return local_rank % visible


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Chooses whether PyTorch uses deterministic kernels only, and restores the choice.

    With them, PyTorch would also fill the memory of each `torch.empty`, which only costs time.
    """
    deterministic: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    # An operation without a deterministic kernel raises, rather than give other bits.
    torch.use_deterministic_algorithms(wanted)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the copy.

    The copy is from pinned memory, which a kernel's stream reads in its turn.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
