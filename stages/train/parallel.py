"""The ranks of a training run: torch.distributed and Megatron's groups, set up and taken down together.

One process without `WORLD_SIZE` in its environment is a world of one and opens no port. Otherwise RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT say who is who, as torchrun and the Slurm launcher set them. Data parallelism is the
only split today.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from stages.model import balance
from stages.model.mcore import parallel_state, tensor_parallel


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    data_rank: int
    data_ranks: int

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over data-parallel ranks, in place; the same bits on each of them."""
        if self.data_ranks > 1:
            dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.world == 1:
            return flag
        value = torch.tensor([int(flag)], device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def session(seed: int) -> Iterator[Ranks]:
    """Makes this process a rank and leaves it as it was found.

    On CPU a rank computes on one thread with deterministic kernels: its sums have the same bits every time.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    meeting: dict[str, Any] = {"store": dist.HashStore()} if world == 1 else {"timeout": timedelta(minutes=10)}
    with warnings.catch_warnings(), contextlib.nullcontext() if on_gpu else _one_thread():
        # deprecation notes of Megatron's and PyTorch's for each other, which nobody who reads this log can act on
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world, **meeting)
        try:
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield Ranks(
                rank,
                world,
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            )
        finally:
            balance.forget()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread and deterministic kernels."""
    filler: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), filler.fill_uninitialized_memory
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    filler.fill_uninitialized_memory = False  # it only slows `torch.empty` down
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        filler.fill_uninitialized_memory = before[2]
