"""The ranks of a training run: torch.distributed and Megatron's groups, set up and taken down together.

One process without `WORLD_SIZE` in its environment is a world of one and opens no port. Otherwise RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT say who is who, as torchrun, the local launcher and the Slurm launcher set them.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.core.errors import AtomError, PeerLost
from stages.mcore import moe_metrics
from stages.mcore.megatron_imports import (
    DistributedDataParallel,
    RotaryEmbedding,
    YarnRotaryEmbedding,
    parallel_state,
    tensor_parallel,
)
from stages.mcore.parallel_layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    layout: Layout
    data_rank: int
    data_ranks: int
    counts_loss: bool
    """Whether this rank's loss enters the sum: of all that compute it, one for each share of the tokens does."""
    wrapped: list[DistributedDataParallel] = field(default_factory=list, compare=False)
    """What was made of this place; it is of no use after the session."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place; the same bits on each of them."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def max(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return value
        found = torch.tensor([value], device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def to_first(self, value: T) -> list[T]:
        """Every rank's value, on rank 0; nothing elsewhere."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values or []

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def place() -> tuple[int, int]:
    """(rank, number of ranks), as the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def session(seed: int, layout: Layout | None = None, patience: float = 600.0) -> Iterator[Ranks]:
    """Makes this process a rank of a layout and leaves it as it was found.

    On CPU a rank computes on one thread with deterministic kernels: its sums have the same bits every time.
    patience: seconds after which a collective that some rank did not join fails.
    Raises AtomError if the number of processes is not the layout's, PeerLost when another rank is lost.
    """
    layout = layout or Layout()
    rank, world = place()
    if world != layout.ranks:
        raise AtomError(
            f"{world} processes were started for parallelism.ranks = {layout.ranks}; start that many, or change the recipe"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    meeting: dict[str, Any] = {"store": dist.HashStore()} if world == 1 else {"timeout": timedelta(seconds=patience)}
    with warnings.catch_warnings(), contextlib.nullcontext() if on_gpu else _one_thread(), _peers(rank):
        # deprecation notes of Megatron's and PyTorch's for each other, which nobody who reads this log can act on
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        ranks: Ranks | None = None
        failed = False
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world, **meeting)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.split_experts,
                distributed_timeout_minutes=math.ceil(patience / 60),
            )
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            ranks = Ranks(
                rank,
                world,
                layout,
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
                parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0,
            )
            yield ranks
        except Exception:
            failed = world > 1
            raise
        finally:
            if not failed:  # else it is left to the end of the process: NCCL would wait for a rank that comes no more
                _take_down(ranks)


def _take_down(ranks: Ranks | None) -> None:
    """Megatron's groups and torch's, and whatever keeps them alive."""
    for wrapped in ranks.wrapped if ranks else ():
        # The hooks of its parameters hold it, and a graph that was not walked back, which the model keeps, holds them:
        # a circle through C++ that Python cannot collect, with the groups and their threads in it.
        vars(wrapped).clear()
    moe_metrics.forget()
    for cached in (RotaryEmbedding, YarnRotaryEmbedding):  # a table kept for a group keeps its threads
        cached.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def _peers(rank: int) -> Iterator[None]:
    """A collective that fails because another rank is gone is no bug of ours: one sentence instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
            raise
        reason = text.strip().splitlines()[0].rpartition("] ")[2][:200]
        raise PeerLost(
            f"rank {rank} lost touch with another rank ({reason}); the log of the rank that went first tells why; "
            f"run again to go on from the last work checkpoint"
        ) from error


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
