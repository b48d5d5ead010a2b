"""Training on text: pre-training, and the phases that continue the model of the one before.

    atom run atom-tiny --until pretrain

Mid-training has longer rows, another mix and a decaying learning rate; the phases of `long_context` are mid-training as
well. Supervised fine-tuning is mid-training on conversations, with loss on the assistant's turns alone: a source of
`kind: chat` is rendered in the release's chat template, and everything up to an assistant's turn carries no loss. Its
mix should keep some of the earlier sources, against forgetting.

A later phase loads only the weights of the last step: the optimizer starts fresh, with its own warmup, because its
states belong to the old mix and batch. With `optimizer_state: carried` it loads them too, and their count of updates,
so that a decay on another mix goes on as one training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.core.stage import TORCH, Inputs, RankSimulation, Report, Stage
from stages.mcore.gpu_environment import variables
from stages.train.config import SftConfig, TrainConfig
from stages.train.estimate import estimate, training_time
from stages.train.layouts import alternatives


def run(config: TrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains a phase on text.

    inputs["tokens"] are Megatron shards; inputs["order"] holds the tokens that each step reads; inputs["init"] is the
    previous phase, if any.

    Resumes from the checkpoint in `work` if an earlier attempt left one. Fills `out` with step-<n>/ (safetensors
    weights and optimizer, state.json), training.jsonl and summary.json. Raises what stages.train.trainer.train raises,
    and AtomError if the init's tensors do not fit the model.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    name = inputs["order"].json("meta.json")["phase"]  # pretrain, midtrain, longcontext-1, ...
    train(TextTrainer, name, config, inputs, work, out, report)


def simulate(config: TrainConfig, rank: int) -> RankSimulation:
    """Simulates a rank of a phase on text."""
    from stages.train import rank_simulation

    return rank_simulation.simulate(config, rank)


STAGE = Stage(
    "pretrain",
    8,
    TrainConfig,
    run,
    estimate=estimate,
    time=training_time,
    alternatives=alternatives,
    ranks=lambda c: c.phase.parallelism.ranks,
    trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    libraries=TORCH,
    simulate=simulate,
)
MIDTRAIN = replace(STAGE, name="midtrain", version=8)
SFT = replace(STAGE, name="sft", version=3, config=SftConfig)
