"""Supervised fine-tuning: mid-training on conversations, with loss on the assistant's turns alone.

    atom run atom-tiny --until sft

Only the data differs from mid-training: a source of `kind: chat` is rendered in the release's chat template, and
everything up to an assistant's turn carries no loss. The mix should keep some of the earlier sources, against
forgetting.
"""

from __future__ import annotations

from pipeline.core.stage import Stage
from stages.mcore.gpu_environment import variables
from stages.train.config import SftConfig
from stages.train.estimate import estimate, training_time
from stages.train.midtrain import run
from stages.train.pretrain import simulate

VERSION = 3
STAGE = Stage(
    "sft",
    VERSION,
    SftConfig,
    run,
    estimate=estimate,
    time=training_time,
    ranks=lambda c: c.phase.parallelism.ranks,
    trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    simulate=simulate,
)
