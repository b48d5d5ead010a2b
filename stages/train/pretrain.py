"""Pre-training: a decoder from its initial weights, on the rows of the order artifact.

atom run atom-tiny --until pretrain
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Inputs, RankSimulation, Report, Stage
from stages.mcore.gpu_environment import variables
from stages.train.config import TrainConfig
from stages.train.estimate import estimate, training_time

VERSION = 8


def run(config: TrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains the first phase on text.

    inputs["tokens"] are Megatron shards; inputs["order"] holds the tokens that each step reads.

    Resumes from the checkpoint in `work` if an earlier attempt left one. Fills `out` with step-<n>/ (safetensors
    weights and optimizer, state.json), training.jsonl and summary.json. Raises what stages.train.trainer.train raises.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    train(TextTrainer, "pretrain", config, inputs, work, out, report)


def simulate(config: TrainConfig, rank: int) -> RankSimulation:
    """Simulates a rank of a phase on text."""
    from stages.train import rank_simulation

    return rank_simulation.simulate(config, rank)


STAGE = Stage(
    "pretrain",
    VERSION,
    TrainConfig,
    run,
    estimate=estimate,
    time=training_time,
    ranks=lambda c: c.phase.parallelism.ranks,
    trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    simulate=simulate,
)
