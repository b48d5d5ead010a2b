"""A reward model, trained on the scored pairs of the policy's answers.

atom run atom-tiny --until reward
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Estimate, Inputs, Report, Stage
from stages.mcore.gpu_environment import variables
from stages.rl import estimates
from stages.rl.config import RewardTrainConfig
from stages.rl.rlvr import simulate

VERSION = 4


def run(config: RewardTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["init"]: the policy that initializes the model; inputs["pairs"]: a dpo artifact; inputs["tokenizer"].

    Fills `out` with step-<n>/, training.jsonl and summary.json with the accuracy on held-out pairs.
    Raises what stages.train.trainer.train raises, and AtomError if there are too few pairs.
    """
    from stages.rl.algorithms.preferences import Reward
    from stages.train.trainer import train

    train(Reward, "reward", config, inputs, work, out, report)


def estimate(config: RewardTrainConfig) -> Estimate:
    tokens = config.phase.steps * 2 * config.phase.pairs * estimates.PAIR_TOKENS
    return estimates.estimate(config, tokens, 3, 4e10)


STAGE = Stage(
    "reward", VERSION, RewardTrainConfig, run, estimate=estimate,
    ranks=lambda c: c.phase.parallelism.ranks, trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    simulate=simulate, time=estimates.update_time,
)  # fmt: skip
