"""A rank of a phase of post-training at its full size on this machine: `atom plan RECIPE --simulate RANK`.

It makes the updates of the phase on packed answers of full length (stages/rl/rollout/batches.py), with logits of the
answers alone: the passes for old and reference log-probabilities, and the objective. Nothing is drawn or scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline.core.stage import RankSimulation
from stages.mcore.simulated_rank import LiveBytes
from stages.rl.algorithms import grpo, preferences
from stages.rl.config import DistillationConfig, DpoPhase, RewardPhase, RlPhase
from stages.rl.estimates import AnyConfig, Examples, fullest_row, reference_bytes, teacher_activations, teacher_bytes
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.train.data import RankBatch
from stages.train.engine import Engine, FrozenModel, Objective
from stages.train.rank_simulation import Update, simulate_updates


def simulate(config: AnyConfig, rank: int) -> RankSimulation:
    """Simulates two updates of a rank, all micro-batches of which are as full as the fullest one."""
    examples, number = fullest_row(config)
    row = examples.row(number)
    simulated = simulate_updates(config, rank, row, update(config), reference_bytes(config))
    # The plan of a rank's own model knows no teacher.
    teacher, state = teacher_bytes(config), simulated.planned_state_bytes
    peak = max(simulated.planned_peak_bytes, state + teacher_activations(config, row))
    return replace(simulated, planned_state_bytes=state + teacher, planned_peak_bytes=peak + teacher)


def update(config: AnyConfig) -> Update:
    """Returns the update of a phase, with the passes that come before it."""
    examples, number = fullest_row(config)
    phase, minimize = config.phase, objective(config.phase)
    teachers: list[FrozenModel] = []

    def step(engine: Engine, memory: LiveBytes, micro_batches: int) -> None:
        batch = full_batch(engine, config, examples, number, micro_batches)
        if isinstance(phase, RlPhase) and phase.updates > 1:
            batch = grpo.with_logprobs(engine, batch, "old")
        if isinstance(phase, RlPhase) and phase.kl_coef is not None:
            with _copies_on_host(engine, memory), engine.computing_with(engine.local_weights()):
                batch = grpo.with_logprobs(engine, batch, "reference")
        if isinstance(config, DistillationConfig):
            if not teachers:
                settings = config.model_copy(update={"model": config.teacher})
                teachers.append(FrozenModel(settings, engine.ranks, config.padded_vocab_size))
            batch = grpo.with_logprobs(teachers[0], batch, "teacher")
        if isinstance(phase, DpoPhase) and phase.stored_pairs is not None:
            batch = grpo.with_logprobs(engine, batch, "start")
        # No number matters here: shapes and memory are what is simulated.
        engine.step(batch, 1e-3, lambda loss, norm: None, objective=minimize)

    return step


def objective(phase: RlPhase | DpoPhase | RewardPhase) -> Objective:
    """Returns the objective of an update of the phase."""
    if isinstance(phase, RlPhase):
        return grpo.objective(phase)
    return preferences.dpo(phase.beta) if isinstance(phase, DpoPhase) else preferences.bradley_terry


def full_batch(engine: Engine, config: AnyConfig, kind: Examples, number: int, micro_batches: int) -> RankBatch:
    """Returns a rank's micro-batches, each of `number` examples."""
    phase, ranks = config.phase, engine.ranks
    # Batches are built of real tensors: the places of tokens decide shapes.
    with unset_fake_temporarily():
        units = [
            [_example(phase, kind, place) for place in range(first, first + kind.unit)]
            for _ in range(micro_batches * ranks.data_ranks)
            for first in range(0, number, kind.unit)
        ]
        return build_rank_batch(units, micro_batches * ranks.data_ranks, ranks, 0, len(units))


def _example(phase: RlPhase | DpoPhase | RewardPhase, kind: Examples, place: int) -> Example:
    """Returns the example at a place in its micro-batch. Neighboring questions differ."""
    # Two questions in turn are enough, since only neighbors with an equal question share its tokens.
    first = place // kind.shared % 2
    ids = range(first, first + kind.question + kind.answer)
    # Values do not matter, except `pair`, which selects rows of the loss.
    ones = [1.0] * kind.answer
    row: dict[str, float] = {}
    by_token: dict[str, list[float]] = {}
    if isinstance(phase, RlPhase):
        row, by_token = {"advantage": 1.0, "weight": 1.0}, {"sampler": ones, "replay": ones}
    elif isinstance(phase, DpoPhase):
        row, by_token = {"pair": float(kind.unit > 1), "stored": 0.0}, {"reference": ones, "anchor": ones}
    else:
        row = {"longer": 1.0}
    return Example(ids, kind.question, row, by_token)


@contextmanager
def _copies_on_host(engine: Engine, memory: LiveBytes) -> Iterator[None]:
    """Counts copies of a rank's weights within it as the host's, where they are on a machine with GPUs."""
    copy = engine.local_weights

    def on_host() -> list[torch.Tensor]:
        with memory.on_host():
            return copy()

    with mock.patch.object(engine, "local_weights", on_host):
        yield
