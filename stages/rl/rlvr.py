"""Reinforcement learning against verifiers (GRPO and its relatives) on top of supervised fine-tuning.

As the node `online-rlhf`, it is against a trained reward model.

    atom run atom-tiny --until rlvr

In each step a curriculum chooses tasks, the policy draws several answers to each, verifiers score them, and the policy
is updated by the recipe's algorithm, once by default. The parts are in stages/rl; docs/post-training.md describes each
setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.stage import TRANSFORMERS, Estimate, Inputs, RankSimulation, Report, ServerPlace, Stage
from stages.generation.samplers import serve, takes_servers
from stages.mcore.gpu_environment import variables
from stages.rl import estimates
from stages.rl.config import RlTrainConfig, SampledConfig, lack

VERSION = 8


def run(config: RlTrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains the policy. Raises what stages.train.trainer.train raises.

    The inputs are `init`, the previous phase, whose last checkpoint's weights are loaded, `tasks`, `items` and
    `tokenizer`; with replay also `tokens` and `order`; with pass_rates also `pass_rates`, the rates of the tasks; if
    tasks name the verifier reward-model, `reward`, its training, and `reward_model`, its export. In a replay
    `rollouts`, the answers of an earlier run, takes the place of items, verifiers, tools and sampler.

    Fills `out` with step-<n>/, training.jsonl, summary.json and rollouts.parquet.
    """
    # Imported here, since a plan reads this module without torch.
    from stages.rl.algorithms.grpo import GrpoTrainer
    from stages.train.trainer import train

    train(GrpoTrainer, config.name, config, inputs, work, out, report)


def estimate(config: RlTrainConfig) -> Estimate:
    phase = config.phase
    answers = phase.prompts_per_step * phase.num_generations
    # A question has at least one token.
    length = estimates.answer_tokens(phase, config.model.context_length - 1)
    tokens = phase.steps * answers * length
    # An answer is drawn once (a forward pass) and trained on once (three); old and reference policy read it once more.
    passes = 4 + estimates.readings(config)
    rollouts = estimates.rollouts(config.name, tokens)
    return estimates.estimate(config, tokens, passes, sampling=phase.sampling, rollouts=rollouts)


def simulate(config: estimates.AnyConfig, rank: int) -> RankSimulation:
    """Simulates a rank of a phase of post-training."""
    from stages.rl import rank_simulation

    return rank_simulation.simulate(config, rank)


def training_functions() -> dict[str, Any]:
    """Returns the functions that the stages of all phases of post-training have in common."""
    return {
        "ranks": lambda config: config.phase.parallelism.ranks,
        "trains": True,
        "environment": lambda config: variables(config.phase.parallelism),
        "libraries": TRANSFORMERS,
        "simulate": simulate,
        "time": estimates.update_time,
    }


def sampling_functions() -> dict[str, Any]:
    """Returns the functions of a stage that draws answers from its policy."""
    return training_functions() | {
        "promise": lambda config: config.phase.promise,
        "lack": lambda config: lack(config.phase),
        "takes_servers": lambda config: takes_servers(config.phase.sampling) or config.phase.scoring_servers > 0,
        "serve": serve_phase,
    }


def serve_phase(config: SampledConfig, place: ServerPlace) -> None:
    """Runs a server of a phase until the phase has ended: the first ones score, the others draw.

    Raises:
        MachineError: The server dies.
        AtomError: A requirement is missing.
    """
    if place.number < config.phase.scoring_servers:
        from stages.rl.rewards import reward_server

        reward_server.serve(place)
    elif takes_servers(config.phase.sampling):
        serve(config.phase.sampling, place)


STAGE = Stage("rlvr", VERSION, RlTrainConfig, run, estimate=estimate, **sampling_functions())
