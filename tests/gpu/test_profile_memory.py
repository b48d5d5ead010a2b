"""Points 8 to 10, and 14: what a step waits for and where its time goes, its memory, what a checkpoint costs, and what
CUDA graphs change.

On a GPU the model is atom-1b-a300m cut to four layers, with packed rows of 4,096 tokens.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.mcore import gpu
from stages.train.checkpoint.work_checkpoint import Checkpoints
from stages.train.config import TrainConfig
from stages.train.engine import cross_entropy
from stages.train.estimate import estimate
from tests.fixtures import gpu_fixtures, train_fixtures
from tests.gpu.conftest import Report

DISPATCH = 3
"""Waits of a layer of experts without Transformer Engine, which are Megatron's: it reads the tokens of each expert, and
selects tokens and their probabilities by a mask."""
ATTENTION = ("_scaled_dot_product", "scaled_dot_product", "_flash_attention", "_efficient_attention", "_varlen_attn")
aten = torch.ops.aten


class HostReads(TorchDispatchMode):
    """Counts the operators of which the host needs a value, or whose result has a size that depends on one."""

    READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in self.READS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """Yields a list that gets the number of times that the host waited for the device: on a GPU what PyTorch warns of,
    on a CPU the operators that would make it wait."""
    counts: list[int] = []
    if not gpu_fixtures.ON_GPU:
        with HostReads() as reads:
            yield counts
        counts.append(reads.count)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))


def waits(config: TrainConfig) -> int:
    """Of a forward and a backward pass over a step, after one to warm up."""
    with gpu_fixtures.engine(config) as engine:
        batch = gpu_fixtures.random_batch(config, engine.ranks)
        for _ in range(2):
            with counted_waits() as counts:
                engine._run(batch, forward_only=False, objective=cross_entropy)
    return counts[0] // len(batch.micro)


def waits_of_a_layer(config: TrainConfig) -> int:
    """The difference of models of two and of one layer, for each layer of a micro-batch."""
    one, two = (config.model_copy(update={"model": config.model.model_copy(update={"layers": n})}) for n in (1, 2))
    return waits(two) - waits(one)


@pytest.mark.point(8)
def test_no_layer_waits_for_the_device(report: Report) -> None:
    count = waits_of_a_layer(gpu_fixtures.phase(dense=True))
    report("waits of a dense layer, forward and backward", f"{count}", "none", count == 0)
    count = waits_of_a_layer(gpu_fixtures.phase())
    report("waits of a layer with experts", f"{count}", f"at most {DISPATCH}, Megatron's dispatch without TE", count <= DISPATCH)  # fmt: skip


@pytest.mark.point(8)
def test_attention_is_a_small_part_of_a_step(report: Report) -> None:
    config, kind = gpu_fixtures.phase(), gpu.device().type
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu_fixtures.ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with gpu_fixtures.engine(config) as engine:
        batch = gpu_fixtures.random_batch(config, engine.ranks)
        for _ in range(2):
            gpu_fixtures.train_step(engine, batch)
        with torch.profiler.profile(activities=activities) as profile:
            gpu_fixtures.train_step(engine, batch)
    name, self_time = ("device_time_total", "self_device_time_total") if gpu_fixtures.ON_GPU else ("cpu_time_total", "self_cpu_time_total")  # fmt: skip
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    attention = sum(getattr(e, name) for e in events if _is_attention(e) and not _is_attention(e.cpu_parent))
    total = sum(getattr(event, self_time) for event in events)
    share = attention / total
    figure = f"{share:.1%} of {total / 1000:.1f} ms of {kind} time, {batch.targets} tokens"
    if gpu_fixtures.ON_GPU:
        report("attention's share of a step", figure, "< 25 %", 0 < share < 0.25)
    else:
        report("attention's share of a step", figure, "measured; < 25 % is asked of a GPU", 0 < share < 1)


def _is_attention(event: Any) -> bool:
    while event is not None:
        if any(part in event.name for part in ATTENTION):
            return True
        event = event.cpu_parent
    return False


@pytest.mark.point(9)
def test_the_peak_of_memory_is_planned(report: Report) -> None:
    """From the construction of the model to the end of its second step."""
    config = gpu_fixtures.phase()
    planned = estimate(config).memory_bytes
    assert planned is not None
    with gpu_fixtures.peak_bytes() as peaks, gpu_fixtures.engine(config) as engine:
        batch = gpu_fixtures.random_batch(config, engine.ranks)
        for _ in range(2):
            gpu_fixtures.train_step(engine, batch)
    (peak,) = peaks
    difference = peak / planned - 1
    report("peak of two steps", f"{peak / 2**20:,.0f} MiB, {difference:+.1%} of the plan", "within 10 % of `atom plan`", abs(difference) < 0.1)  # fmt: skip


@pytest.mark.point(10)
def test_a_checkpoint_costs_what_is_planned(tmp_path: Path, report: Report) -> None:
    """The second one: the first also allocates the copies, and locks their pages on a GPU."""
    config = gpu_fixtures.phase()
    if not gpu_fixtures.ON_GPU:  # large enough to be seen in the memory of this process
        config = config.model_copy(update={"padded_vocab_size": 32768})
    planned = estimate(config).host_bytes
    with gpu_fixtures.engine(config) as engine:
        gpu_fixtures.train_step(engine, gpu_fixtures.random_batch(config, engine.ranks))
        checkpoints = Checkpoints(tmp_path, 1, engine, train_fixtures.Reporter())
        (checkpoints.folder / "training.jsonl").touch()
        before, stalls = gpu_fixtures.resident_bytes(), []
        for step in (1, 2):
            stalls.append(checkpoints.save(step, {"step": step, "optimizer_step": 1}, seal=False))
            checkpoints.wait()
        grown = gpu_fixtures.resident_bytes() - before
    report("host memory of checkpoints", f"{grown / 2**20:,.0f} MiB, {grown / planned:.2f} of the plan", "< 1.2 of the plan", grown < 1.2 * planned)  # fmt: skip
    rate = planned / stalls[1] / 1e9
    figure = f"{stalls[1]:.3f} s for {planned / 1e9:.2f} GB, {rate:.1f} GB/s (the first {stalls[0]:.3f} s)"
    if gpu_fixtures.ON_GPU:
        report("stall of a checkpoint", figure, "> 10 GB/s", rate > 10)
    else:
        report("stall of a checkpoint", figure, "measured; 10 GB/s are asked of a GPU", rate > 0)


@gpu_fixtures.needs_gpu("CUDA graphs")
@pytest.mark.point(14)
def test_graphs_repeat_the_kernels_of_a_layer(report: Report) -> None:
    """The first step records them, the others replay."""
    curves, seconds = [], []
    for graphs in (False, True):
        config = gpu_fixtures.phase(dense=True, pack=False, parallelism={"cuda_graphs": graphs})
        with gpu_fixtures.engine(config) as engine:
            batch = gpu_fixtures.random_batch(config, engine.ranks)
            curve = [gpu_fixtures.train_step(engine, batch) for _ in range(4)]
            began = time.monotonic()
            curve += [gpu_fixtures.train_step(engine, batch) for _ in range(8)]
        seconds.append((time.monotonic() - began) / 8)
        curves.append(curve)
    difference = max(abs(a - b) / b for a, b in zip(*curves, strict=True))
    report("losses of 12 steps with CUDA graphs", f"relative difference {difference:.1e}", "< 1e-3", difference < 1e-3)
    speed = seconds[0] / seconds[1]
    report("a step with CUDA graphs", f"{1000 * seconds[1]:.1f} ms, {1000 * seconds[0]:.1f} ms without: {speed:.2f} times as fast", "> 0.98", speed > 0.98)  # fmt: skip
