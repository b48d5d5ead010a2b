"""A rank of a phase at its full size on this machine: `atom plan RECIPE --simulate RANK`.

The engine of that rank is built and makes two steps as it does on a cluster, with tensors that have no memory
(stages/mcore/simulated_rank.py). Its kernels are PyTorch's. The steps have as many micro-batches as the pipeline
holds at once, so memory reaches its peak, and a few more; what the second step adds is what a micro-batch costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from itertools import groupby

import torch

from pipeline.core.errors import RecipeError
from pipeline.core.stage import RankSimulation, Traffic
from stages.mcore.megatron_imports import parallel_state
from stages.mcore.model import named_tensors
from stages.mcore.simulated_rank import Collective, LiveBytes, simulated
from stages.models.base import Rows
from stages.train import engine as engines
from stages.train.config import TrainConfig, TrainerConfig
from stages.train.data import Batch, RankBatch, padded_width
from stages.train.estimate import rank_memory
from stages.train.parallel import Ranks

Update = Callable[[engines.Engine, LiveBytes, int], object]
"""(engine, count of memory, micro-batches) -> makes an update of so many micro-batches, and what else a step does."""


def simulate(config: TrainConfig, rank: int) -> RankSimulation:
    """Simulates two steps of a rank, every row of which is one document of full length."""
    phase = config.phase
    rows = Rows(phase.micro_rows, phase.sequence_length, phase.pack)
    return simulate_updates(config, rank, rows, update(config))


def update(config: TrainConfig) -> Update:
    """The update of a phase on text."""
    norm_first = config.phase.spikes is not None

    def step(engine: engines.Engine, _: LiveBytes, micro_batches: int) -> None:
        engine.step(full_batch(config, micro_batches), 1e-3, lambda loss, norm: None, norm_first)

    return step


def simulate_updates(
    config: TrainerConfig, rank: int, rows: Rows, step: Update, planned_copies: int = 0
) -> RankSimulation:
    """Simulates two steps of a rank.

    rows: a micro-batch, as the plan sees it; planned_copies: bytes of the copies of weights on the host. Raises
    RecipeError if the layout has no such rank, or if the precision needs kernels that this machine lacks.
    """
    phase, layout = config.phase, config.phase.parallelism
    if not 0 <= rank < layout.ranks:
        raise RecipeError(
            f"rank {rank} is not one of the phase's parallelism.ranks = {layout.ranks}, "
            f"which count from 0 to {layout.ranks - 1}"
        )
    # The largest batch of a ramp needs the most memory.
    micro_batches = max(phase.micro_batch_counts) // layout.data
    unit = layout.pp if layout.vpp > 1 else 1  # the interleaved schedule takes them in groups
    # Two steps with a full pipeline: their difference is what a further group of micro-batches adds.
    counts = [min(micro_batches, layout.pp * layout.vpp + extra) for extra in (0, unit)]
    with simulated(layout, rank) as machine:
        place = parallel_state.get_pipeline_model_parallel_rank()
        is_loss = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        data_rank = parallel_state.get_data_parallel_rank()
        ranks = Ranks(rank, layout.ranks, layout, data_rank, layout.data, is_loss)
        engine = engines.Engine(config, ranks, config.padded_vocab_size)
        parameters = sum(tensor.numel() for _, tensor in named_tensors(engine.chunks))
        steps = []
        for count in counts:
            machine.calls.clear()
            # The peak of this step alone.
            machine.peak = machine.live
            step(engine, machine, count)
            steps.append(list(machine.calls))
        state, peak = machine.live, machine.peak
    share, planned_state, planned_activations = rank_memory(config, rows, place)
    return RankSimulation(
        rank=rank,
        ranks=layout.ranks,
        micro_batches=micro_batches,
        simulated_micro_batches=counts[1],
        parameters=parameters,
        planned_parameters=share.all,
        state_bytes=state,
        planned_state_bytes=round(planned_state),
        peak_bytes=peak,
        planned_peak_bytes=round(planned_state + planned_activations),
        copies_bytes=machine.host_peak,
        planned_copies_bytes=planned_copies,
        traffic=_traffic(steps, counts, micro_batches),
        sequence=tuple((*astuple(call), len(list(calls))) for call, calls in groupby(steps[1])),
    )


def full_batch(config: TrainConfig, micro_batches: int) -> RankBatch:
    """Micro-batches without padding, all tokens of which carry loss."""
    phase = config.phase
    shape = (phase.micro_rows, padded_width(phase.sequence_length, phase.parallelism, phase.quantized))
    ids = torch.zeros(shape, dtype=torch.int64)
    no_padding = torch.zeros(shape, dtype=torch.bool)
    batch = Batch(ids, ids, torch.ones(shape), no_padding, torch.zeros_like(ids) if phase.packed else None)
    return RankBatch([batch] * micro_batches, shape[1], micro_batches * ids.numel() * phase.parallelism.data)


def _traffic(steps: list[list[Collective]], counts: list[int], micro_batches: int) -> tuple[Traffic, ...]:
    """The collectives of a step of that many micro-batches, from two steps of `counts` micro-batches."""
    calls, added = Counter(steps[1]), Counter(steps[1])
    added.subtract(Counter(steps[0]))
    # Each further group of micro-batches adds what the second step had more than the first.
    repeats = (micro_batches - counts[1]) // max(1, counts[1] - counts[0])
    return tuple(
        Traffic(call.operation, call.group, call.ranks, call.bytes, number + repeats * added[call])
        for call, number in calls.items()
    )
