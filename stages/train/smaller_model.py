"""Pre-training of a smaller model of the recipe, on the rows of its pre-training in the same order.

atom run atom-tiny --until size-1
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import Words
from pipeline.core.stage import Inputs, Report, Stage
from stages.mcore.gpu_environment import variables
from stages.train.config import TrainConfig
from stages.train.estimate import estimate, training_time
from stages.train.pretrain import simulate
from stages.train.sizes import NAME

VERSION = 2


class SizeConfig(TrainConfig):
    """Config of the training of a smaller model."""

    name: Annotated[str, Words(20, "name such as size-1", f"{NAME}-[1-9][0-9]?")] = Field(
        description="name of the phase"
    )


def run(config: SizeConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["tokens"], inputs["order"], `work` and `out` as in pre-training, whose order it reads.

    Raises what stages.train.trainer.train raises.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    train(TextTrainer, config.name, config, inputs, work, out, report)


STAGE = Stage(
    NAME, VERSION, SizeConfig, run, estimate=estimate, time=training_time,
    ranks=lambda c: c.phase.parallelism.ranks, trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    simulate=simulate,
)  # fmt: skip
