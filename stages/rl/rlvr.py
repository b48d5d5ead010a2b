"""Reinforcement learning against verifiers (GRPO and its relatives) on top of supervised fine-tuning; as the node
`online-rlhf`, against a trained reward model.

    atom run atom-tiny --until rlvr

In each step a curriculum chooses tasks, the policy draws several answers to each, verifiers score them, and the policy
is updated by the recipe's algorithm, once by default. The parts are in stages/rl; docs/post-training.md describes each
setting.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Estimate, Inputs, RankSimulation, Report, Stage
from stages.generation.samplers import serve, takes_servers
from stages.mcore.gpu_environment import variables
from stages.rl import estimates
from stages.rl.config import RlTrainConfig, lack

VERSION = 5


def run(config: RlTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["init"]: the previous phase, whose last checkpoint's weights are loaded; inputs["tasks"], inputs["items"],
    inputs["tokenizer"]; with replay also inputs["tokens"] and inputs["order"]; if tasks name the verifier reward-model,
    inputs["reward"], its training, and inputs["reward_model"], its export; with tools those that they read. In a replay
    inputs["rollouts"], the answers of an earlier run, takes the place of items, verifiers, tools and sampler.

    Fills `out` with step-<n>/, training.jsonl, summary.json and rollouts.parquet.
    Raises what stages.train.trainer.train raises.
    """
    from stages.rl.algorithms.grpo import GrpoTrainer
    from stages.train.trainer import train

    train(GrpoTrainer, config.name, config, inputs, work, out, report)


def estimate(config: RlTrainConfig) -> Estimate:
    phase = config.phase
    answers = phase.prompts_per_step * phase.num_generations
    length = estimates.answer_tokens(phase, config.model.context_length - 1)
    tokens = phase.steps * answers * length
    # an answer is drawn once (a forward pass) and trained on once (three); old and reference policy read it once more
    passes = 4 + (phase.updates > 1) + (phase.kl_coef is not None)
    rollouts = estimates.rollouts(config.name, tokens)
    return estimates.estimate(config, tokens, passes, sampling=phase.sampling, rollouts=rollouts)


def simulate(config: estimates.AnyConfig, rank: int) -> RankSimulation:
    """Simulates a rank of a phase of post-training."""
    from stages.rl import rank_simulation

    return rank_simulation.simulate(config, rank)


STAGE = Stage(
    "rlvr", VERSION, RlTrainConfig, run, estimate=estimate,
    promise=lambda c: c.phase.promise,
    lack=lambda c: lack(c.phase), ranks=lambda c: c.phase.parallelism.ranks, trains=True,
    environment=lambda c: variables(c.phase.parallelism),
    takes_servers=lambda c: takes_servers(c.phase.sampling), serve=lambda c, place: serve(c.phase.sampling, place),
    simulate=simulate, time=estimates.update_time,
)  # fmt: skip
