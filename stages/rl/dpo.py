"""Reinforcement learning from preferences: rounds of DPO on pairs of the policy's own answers.

    atom run atom-tiny --until dpo

A reward function scores the answers; the best and the worst answer to a question are a pair, which is stored with its
source. A loss on correct answers to verified tasks preserves skills. docs/post-training.md describes each setting.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Estimate, Inputs, Report, Stage
from stages.rl import estimates
from stages.rl.config import DpoTrainConfig
from stages.rl.rlvr import sampling_functions

VERSION = 7


def run(config: DpoTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains the policy. Raises what stages.train.trainer.train raises.

    The inputs are `init`, the previous phase, whose last checkpoint's weights are loaded, `tasks`, `items`,
    `tokenizer`, and `preferences` if a round learns from stored pairs. In a replay `rollouts` is as in stages.rl.rlvr.

    Fills `out` with step-<n>/, training.jsonl, summary.json, rollouts.parquet and pairs.parquet.
    """
    # Imported here, since a plan reads this module without torch.
    from stages.rl.algorithms.preferences import Dpo
    from stages.train.trainer import train

    train(Dpo, "dpo", config, inputs, work, out, report)


def estimate(config: DpoTrainConfig) -> Estimate:
    phase = config.phase
    answers = sum(a.count * a.num_generations for a in (phase.preferences, phase.sft_tasks) if a)
    length = phase.sampling.max_new_tokens
    tokens = phase.steps * answers * length
    # All answers are drawn, and a third is trained on. Stored pairs are read once, and trained on.
    stored = phase.stored_pairs
    of_files = 4 * phase.steps * 2 * stored.count * stored.max_tokens if stored else 0
    passes, rollouts = 3 + of_files / tokens, estimates.rollouts("dpo", tokens)
    return estimates.estimate(config, tokens, passes, sampling=phase.sampling, rollouts=rollouts)


STAGE = Stage("dpo", VERSION, DpoTrainConfig, run, estimate=estimate, **sampling_functions())
