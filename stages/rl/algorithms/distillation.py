"""On-policy distillation: the policy learns from a teacher's log-probabilities of the tokens that it drew.

The answers of a step are drawn and stored as in reinforcement learning. Then the teacher, another model in the layout
of the student, reads them once. A replay reads the answers too, and computes the teacher's log-probabilities again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.rl.algorithms.grpo import GrpoTrainer, with_logprobs
from stages.rl.config import DistillationConfig
from stages.rl.rollout.batches import Example
from stages.rl.rollout.rollouts import Rollout
from stages.train.data import RankBatch
from stages.train.engine import FrozenModel


def no_advantages(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns 0 for each answer: rewards train nothing, and the objective adds the teacher's advantages by token."""
    return torch.zeros(rewards.shape)


class DistillationTrainer(GrpoTrainer):
    """The loop of on-policy distillation. inputs["teacher"] is the phase that trained the teacher."""

    config: DistillationConfig
    # A teacher has most to say where the student always fails, to which a curriculum for rewards seldom goes.
    uniform = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.algorithm = replace(self.algorithm, advantages=no_advantages)
        settings = self.config.model_copy(update={"model": self.config.teacher})
        self.teacher = FrozenModel(settings, self.engine.ranks, self.policy.chat.vocab_size)

    def load_base(self) -> None:
        # By every attempt, since no checkpoint of the student holds it.
        self.last_checkpoint("teacher").load_frozen(self.teacher)

    def mark(self, answers: Sequence[Rollout]) -> tuple[list[Rollout], int]:
        """Keeps every answer: what the teacher says of a token needs neither an end nor a better answer."""
        samples = self.phase.num_generations
        marked = [replace(r, group=i // samples, sample=i % samples, dropped="") for i, r in enumerate(answers)]
        return marked, len(answers) // samples

    def _batches(self, step: int, groups: Sequence[Sequence[Example]]) -> dict[int, RankBatch]:
        batches = super()._batches(step, groups)
        return {number: with_logprobs(self.teacher, batch, "teacher") for number, batch in batches.items()}

    def write_outputs(self, out: Path) -> dict[str, Any]:
        gaps = [line["teacher_gap"] for line in self.log.lines() if "teacher_gap" in line]
        return super().write_outputs(out) | {"teacher_gap": {"first": gaps[0], "last": gaps[-1]}}
