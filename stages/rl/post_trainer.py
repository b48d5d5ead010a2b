"""The loop of post-training: each step returns its metrics, and the algorithm has a state of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs
from pipeline.core.store import sha256_file
from stages.rl.rollout.generation import Chat
from stages.train.checkpoint import release_checkpoint
from stages.train.trainer import Trainer


class PostTrainer(Trainer):
    """inputs["init"]: the previous phase, whose last weights are loaded; inputs["tokenizer"]."""

    rng = "not used: every answer has a seed of its own, which follows from the recipe's"

    @staticmethod
    def vocab_size(inputs: Inputs) -> int:
        return Chat(inputs["tokenizer"]).vocab_size

    def load_previous_phase(self) -> None:
        """Raises AtomError as well if the earlier phase was trained on another tokenizer's tokens, which its checkpoint
        states if the phase read text: neither a policy nor its reference could read this one's."""
        init = self.inputs["init"]
        last = init / release_checkpoint.name_of(release_checkpoint.steps_of(init.path)[-1])
        saved = release_checkpoint.load_state(last).get("tokenizer")
        if saved and saved != sha256_file(self.inputs["tokenizer"] / "tokenizer.json"):
            raise AtomError(
                f"{self.name}: the policy {init.key} and reference of the phase was trained on another tokenizer's "
                "tokens; begin with one of this recipe's tokenizer"
            )
        super().load_previous_phase()

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
