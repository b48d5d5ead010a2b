"""The GPU of a rank: which one it is, and the settings of CUDA's libraries. Without CUDA, nothing changes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from stages.mcore.parallel_layout import Layout

BACKENDS = "cpu:gloo,cuda:nccl"
"""torch.distributed's backends with GPUs, by the device of a tensor."""


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def number(local_rank: int, visible: int) -> int:
    """The GPU of a rank among those that it sees: `local_rank`, or the only one if each task sees just its own."""
    return local_rank % visible


def sharing(places: Sequence[tuple[str, str]]) -> str | None:
    """A sentence if two ranks have the same GPU, else None. places: the (node, GPU) of each rank.

    NCCL would refuse two ranks on one GPU with a message that names neither of them.
    """
    first: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        if (other := first.setdefault(place, rank)) != rank:
            node = [p for p in places if p[0] == place[0]]
            return (
                f"ranks {other} and {rank} have the same GPU: node {place[0]} runs {len(node)} ranks on "
                f"{len(set(node))} GPUs; lower parallelism.ranks, or correct gpus_per_node in the cluster profile"
            )
    return None


def variables(layout: Layout) -> dict[str, str]:
    """The environment variables of CUDA, NCCL and Transformer Engine for a layout. What is already set is kept."""
    chosen = {
        # Steps differ in width and in the tokens of each expert; segments that grow do not fragment the memory.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # One hardware queue keeps the order of kernels and collectives, on which the overlap of tensor- and
        # context-parallel communication relies before Blackwell; otherwise many queues overlap more.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1" if layout.tp > 1 or layout.cp > 1 else "32",
    }
    if layout.ranks > 1:
        # Norm kernels leave multiprocessors to the collectives that run beside them.
        chosen |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"}
    if layout.cuda_graphs:
        # NCCL would register the buffers of a graph, which segments that grow may move; Megatron-core refuses both.
        chosen["NCCL_GRAPH_REGISTER"] = "0"
    if layout.deterministic:
        chosen |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one workspace a stream, so that cuBLAS splits its sums alike
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # no attention kernels that add atomically
            "NCCL_ALGO": "Ring",  # one order of adding, whatever NCCL would choose for a size
        }
    return chosen


@contextmanager
def settings(layout: Layout) -> Iterator[None]:
    """Sets `variables` and PyTorch's switches, and restores them. CUDA reads its variables when it starts, so the first
    session of a process decides."""
    added = {name: value for name, value in variables(layout).items() if name not in os.environ}
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    os.environ.update(added)
    torch.use_deterministic_algorithms(layout.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        for name in added:
            del os.environ[name]


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for the copy: from pinned memory, which a kernel's stream reads
    in its turn."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
