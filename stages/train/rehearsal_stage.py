"""Stage `rehearsal`: takes the first steps of a costly phase, with a restart in between, before the phase begins.

    atom run RECIPE --only rehearsal-pretrain

The first start takes two steps as the phase would, saves a work checkpoint, takes the next step, and ends. The launcher
starts new processes, which load the checkpoint, take the same step again, compare it on every rank, and measure ten
more. The phase waits for this stage without reading it, so its key and its bytes are those without a rehearsal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.core.stage import TORCH, Accelerator, Estimate, Inputs, Report, Stage, TrainingTime
from stages.mcore.gpu_environment import variables
from stages.train.config import TrainConfig
from stages.train.estimate import checkpoint_size, estimate, training_time
from stages.train.rehearsal import NAME, STEPS, RehearsalConfig


def run(config: RehearsalConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `rehearsal.json`: {phase, ranks, exact, restored_step, before, after}.

    The inputs are those of the phase. Speed and nodes go to the record of the start.

    Raises:
        Restart: The checkpoint is written and the step after it is taken: the next start compares.
        CheckFailed: The restart does not hold what was saved, the step after it came out otherwise, or the phase is
            slow and the recipe says to stop.
        AtomError: As stages.train.pretrain.run.
    """
    from stages.train.rehearsal_trainer import Rehearsal
    from stages.train.trainer import train

    train(Rehearsal, inputs["order"].json("meta.json")["phase"], config, inputs, work, out, report)


def rehearsed_part(config: RehearsalConfig) -> TrainConfig:
    """Returns the config of a phase that ends with the last step of its rehearsal, for estimates."""
    phase = config.phase
    last = phase.first_step - 1 + STEPS
    ramp = tuple(part for part in phase.batch.ramp if part.until_step < last)
    batch = phase.batch.model_copy(update={"ramp": ramp, "global_tokens": phase.rows_of(last) * phase.sequence_length})
    short = {"steps": last, "batch": batch, "release_checkpoint_steps": (), "merge": None}
    return config.model_copy(update={"phase": phase.model_copy(update=short)})


def _estimate(config: RehearsalConfig) -> Estimate:
    """The needs of the rehearsed steps: one work checkpoint, and nothing that is published."""
    needs, size = estimate(rehearsed_part(config)), checkpoint_size(config).all
    assert needs.training is not None
    training = replace(needs.training, release_checkpoints=0, work_checkpoints=1, checkpoint_interval=STEPS)
    disk = 100_000 + 200 * config.layout.ranks  # each rank has a digest in the lines before and after
    return replace(needs, training=training, disk_bytes=disk, work_bytes=size, files=2, published=())


def _time(config: RehearsalConfig, gpu: Accelerator) -> TrainingTime:
    return training_time(rehearsed_part(config), gpu)


STAGE = Stage(
    NAME,
    1,
    RehearsalConfig,
    run,
    estimate=_estimate,
    time=_time,
    ranks=lambda c: c.phase.parallelism.ranks,
    trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    libraries=TORCH,
)
