"""Mid-training: continues the model of the previous phase with longer rows, another mix and a decaying learning rate.

    atom run atom-tiny --until midtrain

The phases of a recipe's `long_context` are mid-training as well, each after the previous one. A phase loads only the
weights of the last step: the optimizer starts fresh, with its own warmup, because its states belong to the old mix and
batch.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Inputs, Report, Stage
from stages.mcore.gpu_environment import variables
from stages.train.config import TrainConfig
from stages.train.estimate import estimate, training_time
from stages.train.pretrain import simulate

VERSION = 8


def run(config: TrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["tokens"], inputs["order"], `work` and `out` as in pre-training; inputs["init"]: the previous phase.

    Raises what stages.train.trainer.train raises, and AtomError if the init's tensors do not fit the model.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    name = inputs["order"].json("meta.json")["phase"]  # midtrain, longcontext-1, ...
    train(TextTrainer, name, config, inputs, work, out, report)


STAGE = Stage(
    "midtrain",
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
