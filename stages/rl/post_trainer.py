"""The loop of post-training: each step returns its metrics, and the algorithm has a state of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pipeline.core.stage import Inputs
from stages.rl.rollout.generation import Chat
from stages.train.trainer import Trainer


class PostTrainer(Trainer):
    """inputs["init"]: the previous phase, whose last weights are loaded; inputs["tokenizer"]."""

    rng = "not used: every answer has a seed of its own, which follows from the recipe's"

    @staticmethod
    def vocab_size(inputs: Inputs) -> int:
        return Chat(inputs["tokenizer"]).vocab_size

    @abstractmethod
    def train_step(self, step: int) -> dict[str, Any]:
        """Takes a step; returns its metrics for the log."""

    def algorithm_state(self) -> dict[str, Any]:
        """The algorithm's part of a checkpoint, as JSON."""
        return {}

    def restore_algorithm(self, state: dict[str, Any]) -> None:
        """Restores the algorithm from `algorithm_state`."""

    def step(self, step: int) -> int:
        self.log_step(step, self.train_step(step))
        return step

    def state(self, step: int) -> dict[str, Any]:
        return {"rl": self.algorithm_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.restore_algorithm(state["rl"])
