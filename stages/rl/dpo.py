"""Reinforcement learning from preferences: rounds of DPO on pairs of the policy's own answers.

    atom run atom-tiny --until dpo

A reward function scores the answers; the best and the worst answer to a question are a pair, which is stored with its
source. A loss on correct answers to verified tasks preserves skills. docs/post-training.md describes each setting.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Estimate, Inputs, Report, Stage
from stages.generation.samplers import serve, takes_servers
from stages.mcore.gpu_environment import variables
from stages.rl import estimates
from stages.rl.config import DpoTrainConfig, lack
from stages.rl.rlvr import simulate

VERSION = 6


def run(config: DpoTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["init"]: the previous phase, whose last checkpoint's weights are loaded; inputs["tasks"], inputs["items"],
    inputs["tokenizer"]. In a replay inputs["rollouts"] is as in stages.rl.rlvr.

    Fills `out` with step-<n>/, training.jsonl, summary.json, rollouts.parquet and pairs.parquet.
    Raises what stages.train.trainer.train raises.
    """
    from stages.rl.algorithms.preferences import Dpo
    from stages.train.trainer import train

    train(Dpo, "dpo", config, inputs, work, out, report)


def estimate(config: DpoTrainConfig) -> Estimate:
    phase = config.phase
    answers = sum(a.count * a.num_generations for a in (phase.preferences, phase.sft_tasks) if a)
    length = phase.sampling.max_new_tokens
    tokens = phase.steps * answers * length
    # all are drawn, a third is trained on
    return estimates.estimate(config, tokens, 3, sampling=phase.sampling, rollouts=estimates.rollouts("dpo", tokens))


STAGE = Stage(
    "dpo", VERSION, DpoTrainConfig, run, estimate=estimate,
    promise=lambda c: c.phase.sampling.promise,
    lack=lambda c: lack(c.phase), ranks=lambda c: c.phase.parallelism.ranks, trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    takes_servers=lambda c: takes_servers(c.phase.sampling), serve=lambda c, place: serve(c.phase.sampling, place),
    simulate=simulate, time=estimates.update_time,
)  # fmt: skip
