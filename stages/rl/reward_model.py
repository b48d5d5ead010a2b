"""A reward model, trained on pairs of answers: of files, or of the policy's scored answers.

atom run atom-tiny --until reward
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Estimate, Inputs, Report, Stage
from stages.rl import estimates
from stages.rl.config import RewardTrainConfig
from stages.rl.rlvr import training_functions

VERSION = 5


def run(config: RewardTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains the reward model.

    The inputs are `init`, the policy that initializes the model, `preferences` or `pairs`, a dpo artifact, and
    `tokenizer`. Fills `out` with step-<n>/, training.jsonl, and summary.json with the accuracy on held-out pairs.

    Raises:
        AtomError: There are too few pairs; and what stages.train.trainer.train raises.
    """
    # Imported here, since a plan reads this module without torch.
    from stages.rl.algorithms.preferences import Reward
    from stages.train.trainer import train

    train(Reward, "reward", config, inputs, work, out, report)


def estimate(config: RewardTrainConfig) -> Estimate:
    length = config.phase.max_tokens or estimates.PAIR_TOKENS
    tokens = config.phase.steps * 2 * config.phase.pairs * length
    # Nothing is drawn, so the rate of a core is that of training alone.
    return estimates.estimate(config, tokens, 3, 4e10)


STAGE = Stage("reward", VERSION, RewardTrainConfig, run, estimate=estimate, **training_functions())
