"""Supervised fine-tuning: mid-training on conversations, with loss on the assistant's turns alone.

    atom run atom-tiny --until sft

Only the data differs from mid-training: a source of `kind: chat` is rendered in the release's chat template, and
everything up to an assistant's turn carries no loss. The mix should keep some of the earlier sources, against
forgetting.
"""

from __future__ import annotations

from dataclasses import replace

from stages.train import midtrain
from stages.train.config import SftConfig

VERSION = 3
STAGE = replace(midtrain.STAGE, name="sft", version=VERSION, config=SftConfig)
