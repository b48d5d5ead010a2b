"""Mid-training: continues the model of the previous phase with longer rows, another mix and a decaying learning rate.

    atom run atom-tiny --until midtrain

The phases of a recipe's `long_context` are mid-training as well, each after the previous one. A phase loads only the
weights of the last step: the optimizer starts fresh, with its own warmup, because its states belong to the old mix and
batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.core.stage import Inputs, Report
from stages.train import pretrain
from stages.train.config import TrainConfig

VERSION = 8


def run(config: TrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains a phase on text that begins with the model of another one.

    inputs["tokens"], inputs["order"], `work` and `out` are as in pre-training; inputs["init"] is the previous phase.

    Raises what stages.train.trainer.train raises, and AtomError if the init's tensors do not fit the model.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    name = inputs["order"].json("meta.json")["phase"]  # midtrain, longcontext-1, ...
    train(TextTrainer, name, config, inputs, work, out, report)


STAGE = replace(pretrain.STAGE, name="midtrain", version=VERSION, run=run)
