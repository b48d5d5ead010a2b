"""The ranks of a training run: sets up and destroys torch.distributed and Megatron's process groups.

One process without `WORLD_SIZE` in its environment is a world of one and opens no port. Otherwise RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT identify the ranks, as torchrun, the local launcher and the Slurm launcher set them.
"""

from __future__ import annotations

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
from torch import Tensor

from pipeline.core.errors import AtomError, PeerLost
from stages.mcore import gpu, gpu_environment, routers
from stages.mcore.megatron_imports import (
    DistributedDataParallel,
    RotaryEmbedding,
    YarnRotaryEmbedding,
    delete_cuda_graphs,
    parallel_state,
    tensor_parallel,
)
from stages.models.parallel_layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the layout."""

    rank: int
    world: int
    layout: Layout
    data_rank: int
    data_ranks: int
    counts_loss: bool
    """True if this rank's loss enters the sum: one rank for each share of the tokens."""
    objects: dist.ProcessGroup | None = field(default=None, compare=False)
    """All ranks as a group of gloo, for objects and for tensors of the host; None: the default group is one."""
    wrapped: list[DistributedDataParallel] = field(default_factory=list, compare=False)
    """The DDP modules of the session, which are cleared at its end."""

    @property
    def first(self) -> bool:
        """True if this process writes files and reports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        return gpu.device()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on the rank's device; the same bits on each of them.

        The tensor itself changes if it is there.
        """
        if self.world > 1:
            value = value.to(self.device)  # a rank without any layer with experts starts from a zero on the CPU
            dist.all_reduce(value)
        return value

    def max(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value])  # on CPU, by gloo: it waits for no kernel of a GPU
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.objects)
        return int(tensor.item())

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        # Objects go by gloo: NCCL would first copy them to the GPU.
        dist.broadcast_object_list(values, src=0, group=self.objects)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def barrier(self) -> None:
        # By gloo: with NCCL, the barrier of torch would be a kernel of the GPU.
        self.max(0)


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks), from the launcher's environment variables."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def session(seed: int, layout: Layout | None = None, timeout: float = 600.0) -> Iterator[Ranks]:
    """Makes this process a rank of a layout, and restores its state at the end.

    On CPU a rank computes on one thread with deterministic kernels: its sums have the same bits every time.
    timeout: seconds after which a collective that some rank did not join fails.
    Raises AtomError if the number of processes is not the layout's, or if this process lacks an environment variable
    that its GPU needs; PeerLost when another rank is lost.
    """
    layout = layout or Layout()
    rank, world = rank_and_world()
    if world != layout.ranks:
        raise AtomError(
            f"{world} processes were started for parallelism.ranks = {layout.ranks}; start that many, "
            "or change the recipe"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Before CUDA starts, which reads the variables once.
        gpu_environment.require(layout)
        torch.cuda.set_device(gpu.number(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
    # A hash store for one process: no port is opened, so many phases may run on a machine.
    rendezvous: dict[str, Any] = {"store": dist.HashStore()} if world == 1 else {"timeout": timedelta(seconds=timeout)}
    kernels = gpu.deterministic_kernels(layout.deterministic) if on_gpu else _deterministic_cpu()
    with warnings.catch_warnings(), kernels, _no_tf32(), _peer_errors(rank):
        # deprecation warnings between Megatron and PyTorch, which are useless in this log
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        ranks: Ranks | None = None
        failed = False
        # Naming the device here (`device_id`) would build NCCL's communicators of all of Megatron's groups at once, of
        # which most layouts use a few.
        dist.init_process_group(gpu.BACKEND if on_gpu else "gloo", rank=rank, world_size=world, **rendezvous)
        try:
            objects = create_groups(layout, timeout, on_gpu)
            # Layers fork Megatron's named generators, which have to exist even without dropout. CUDA graphs need such
            # that they can replay.
            tensor_parallel.model_parallel_cuda_manual_seed(
                seed, use_cudagraphable_rng=layout.cuda_graphs, force_reset_rng=layout.cuda_graphs
            )
            ranks = Ranks(
                rank,
                world,
                layout,
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
                parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0,
                objects,
            )
            yield ranks
        except Exception:
            failed = world > 1
            raise
        finally:
            if not failed:  # else it is left to the end of the process: NCCL would wait for the lost rank
                if layout.cuda_graphs:  # a list of the process, which records no other model while it has some
                    delete_cuda_graphs()
                _destroy_groups(ranks)


def create_groups(layout: Layout, timeout: float, on_gpu: bool) -> dist.ProcessGroup | None:
    """Creates Megatron's groups, of the default group's backend.

    Returns a group of gloo for objects, or None if the default group is one or there is one rank.

    gloo connects each rank of a group with each other one: hundreds of sockets for each group of a large layout. So it
    has one group only, and Megatron's own groups of gloo, which its checkpoints would use, are left out.
    """
    objects: dist.ProcessGroup | None = None
    if on_gpu and layout.ranks > 1:
        # A group of its own for objects and for numbers on the host, which then wait for no kernel.
        objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    parallel_state.initialize_model_parallel(
        **layout.group_sizes, distributed_timeout_minutes=math.ceil(timeout / 60), create_gloo_process_groups=False
    )
    return objects


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Computes products of fp32 in fp32.

    This is the default, unless TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as in NVIDIA's images.
    """
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)


def _destroy_groups(ranks: Ranks | None) -> None:
    """Destroys Megatron's and torch's process groups, and the references that keep them alive."""
    for wrapped in ranks.wrapped if ranks else ():
        # The hooks of its parameters hold it, and a graph without a backward pass, which the model keeps, holds them: a
        # cycle through C++ that Python cannot collect, with the groups and their threads in it.
        vars(wrapped).clear()
    routers.clear_losses()
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):  # a table kept for a group keeps its threads
        embedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def _peer_errors(rank: int) -> Iterator[None]:
    """Raises PeerLost in place of the RuntimeError of a collective whose peer has exited."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # gloo raises plain RuntimeErrors, which only their text tells from others.
        if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
            raise
        reason = text.strip().splitlines()[0].rpartition("] ")[2][:200]
        raise PeerLost(
            f"rank {rank} lost touch with another rank ({reason}); the log of the rank that went first tells why; "
            f"run again to go on from the last work checkpoint"
        ) from error


@contextmanager
def _deterministic_cpu() -> Iterator[None]:
    """One CPU thread and deterministic kernels."""
    threads = torch.get_num_threads()
    # With several threads, the order of a sum depends on how work is divided among them.
    torch.set_num_threads(1)
    try:
        with gpu.deterministic_kernels(True):
            yield
    finally:
        torch.set_num_threads(threads)
