"""Verifiers by name, and the judges of answers to which no rule has one right answer: rules, or a reward model.

A judge is a verifier: it gives each answer a reward, and of two answers prefers the one with the higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RecipeError
from pipeline.core.stage import Inputs
from pipeline.core.store import Artifact
from stages.data import chat
from stages.rl.protocols import Parts, Response, Row, Verifier, VerifierFailed, question
from stages.rl.rewards.verifiers import FrozenScorer, make_verifier
from stages.rl.rollout.tasks import CODE

if TYPE_CHECKING:
    from stages.rl.rollout.generation import Chat

ROWS = 64


class Courtesy(FrozenScorer):
    """The rules for a courteous note (stages/scorers)."""

    name = "courtesy"


class RewardModel:
    """A trained judge: an exported model in whose eyes `<|endoftext|>` follows an answer with a certain
    log-probability, its score. The reward is the chance, by Bradley and Terry, that the answer is preferred to one of
    middling score."""

    name, runs_code = "reward-model", False

    def __init__(self, artifact: Artifact, center: float, chat: Chat) -> None:
        """artifact: the export; center: the mean score of held-out pairs, which its training measured."""
        import torch
        from transformers import AutoModelForCausalLM

        folder = artifact / "model"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        self.chat, self.center, self.version = chat, center, artifact.key

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        import torch

        rows = [
            reward_input(self.chat, question(row), response.text, response.finished)[:-1] for row, response in answers
        ]
        limit = self.model.config.max_position_embeddings
        rewards: list[float] = [0.0] * len(rows)
        for (row, response), ids in zip(answers, rows, strict=True):
            if response.finished and len(ids) > limit:
                raise VerifierFailed(
                    f"verifier {self.name} cannot judge row {row['id']}: {len(ids)} tokens are more than its context "
                    f"of {limit}; allow shorter answers"
                )
        order = sorted((i for i in range(len(rows)) if len(rows[i]) <= limit), key=lambda i: (len(rows[i]), i))
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            last = torch.tensor([len(rows[i]) - 1 for i in batch])
            width = int(last.max()) + 1
            ids = torch.tensor([[*rows[i], *[self.chat.pad] * (width - len(rows[i]))] for i in batch])
            with torch.inference_mode():
                logits = self.model(ids).logits[torch.arange(len(batch)), last]
            scores = torch.log_softmax(logits.double(), -1)[:, self.chat.end]
            probabilities = torch.sigmoid(scores - self.center).tolist()
            for i, probability in zip(batch, probabilities, strict=True):
                rewards[i] = probability if answers[i][1].finished else 0.0
        return [{"reward": probability} for probability in rewards]

    def close(self) -> None:
        del self.model


def reward_input(template: Chat, prompt: str, text: str, finished: bool) -> list[int]:
    """The token ids of a question and its answer in the chat template, and of the token whose probability is the
    reward."""
    ids = template.tokenizer.encode(
        chat.render([{"role": "user", "content": prompt}], ask=True), add_special_tokens=False
    ).ids
    ids += template.tokenizer.encode(text, add_special_tokens=False).ids
    return [*ids, *([template.turn_end] if finished else []), template.end]


def make_verifiers(
    rows: Sequence[Row], inputs: Inputs, chat: Chat, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Verifier]:
    """The verifiers that these tasks name. Raises RecipeError for an unknown name."""
    from stages.rl import sandbox

    verifiers: dict[str, Verifier] = {}
    for name in sorted({str(row["verifier"]) for row in rows}):
        if name == Courtesy.name:
            verifiers[name] = Courtesy()
        elif name == RewardModel.name:
            if "reward" not in inputs:
                raise RecipeError("tasks name the verifier reward-model, which only online_rlhf has; use another judge")
            verifiers[name] = RewardModel(inputs["reward_model"], inputs["reward"].json("summary.json")["centre"], chat)
        else:
            if name == CODE and (reason := sandbox.missing()):
                raise RecipeError(f"tasks of the verifier {CODE} run what the model writes: {reason}")
            verifiers[name] = make_verifier(name, **settings.get(name, {}))
    return verifiers
