"""Verifier `reward-model`: an exported reward model, trained on pairs of answers. Parts: `reward`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, operational
from stages.formats.chat import control_tokens
from stages.rl.protocols import Answer, ChatTokenizer, Parts, Verifier, VerifierContext, VerifierFailed
from stages.rl.rewards.reward_scorer import RewardScorer, batches
from stages.rl.rewards.reward_server import ServedScorer
from stages.tasks import messages_of


class RewardModelSettings(Config):
    """How the reward model is run."""

    servers: Annotated[int, Range(0, 1000)] = operational(0)
    """number of the servers of the cluster profile (slurm.servers) that hold the reward model and score; without such
    servers the phase starts one on its machine; 0: rank 0 scores, on its device in fp32"""


class RewardModel(Verifier):
    """The score of an answer is the log-probability that `<|endoftext|>` follows it.

    The reward is the probability, by Bradley and Terry, that the answer is preferred to one of mean score; it is 0
    for an answer with special tokens that does not fit the context once these are written out.
    """

    name = "reward-model"
    Settings = RewardModelSettings

    def __init__(self, context: VerifierContext[RewardModelSettings]) -> None:
        """Loads the export, or finds its servers: inputs["reward_model"].

        Its training, inputs["reward"], measured the mean score of held-out pairs.

        Raises:
            RecipeError: The inputs are missing.
            AtomError: The export has another tokenizer than the policy.
        """
        if "reward" not in context.inputs:
            raise RecipeError(
                "tasks name the verifier reward-model, which only online_rlhf has; use another reward function"
            )
        from tokenizers import Tokenizer

        assert context.chat is not None, "a phase has a tokenizer"
        artifact = context.inputs["reward_model"]
        read_by = Tokenizer.from_file(str(artifact / "model" / "tokenizer.json"))
        if read_by.to_str() != context.chat.tokenizer.to_str():
            raise AtomError(
                f"the reward model {artifact.key} has another tokenizer than the policy, whose answers it cannot read; "
                "train it on pairs of this policy"
            )
        self.chat, self.version = context.chat, artifact.key
        self.center: float = context.inputs["reward"].json("summary.json")["centre"]
        self.scorer: _LocalScorer | ServedScorer
        if context.settings.servers:
            self.scorer = ServedScorer(artifact / "model", artifact.key)
            # Rounded otherwise, so the scores are others.
            if self.scorer.dtype != "float32":
                self.version = f"{artifact.key} in {self.scorer.dtype}"
        else:
            self.scorer = _LocalScorer(artifact / "model")

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        rows = [
            # Without the last token, whose probability is the score.
            reward_input(self.chat, messages_of(row), response.text, response.finished)[:-1]
            for row, response in answers
        ]
        limit = self.scorer.longest
        for (row, response), ids in zip(answers, rows, strict=True):
            # A special token that is written out takes many tokens, so such an answer is too long by its own fault.
            if response.finished and len(ids) > limit and not control_tokens(response.text):
                raise VerifierFailed(
                    f"verifier {self.name} cannot score row {row['id']}: {len(ids)} tokens are more than its context "
                    f"of {limit}; allow shorter answers"
                )
        scores = self.scorer.scores(rows, self.chat.pad, self.chat.end)
        return [
            {"reward": 0.0 if score is None or not response.finished else _sigmoid(score - self.center)}
            for (_, response), score in zip(answers, scores, strict=True)
        ]

    def close(self) -> None:
        self.scorer.close()


class _LocalScorer:
    """The reward model in this process, in fp32 on the device of the rank, beside the policy."""

    def __init__(self, folder: Path) -> None:
        from stages.mcore import gpu

        self.model = RewardScorer(folder, gpu.start())
        self.longest = self.model.longest

    def scores(self, rows: Sequence[Sequence[int]], pad: int, end: int) -> list[float | None]:
        """Returns the score of each row; None for one that is longer than the context."""
        scores: list[float | None] = [None] * len(rows)
        for part in batches(rows, self.longest, self.model.rows):
            for number, value in zip(part, self.model.scores([rows[n] for n in part], pad, end), strict=True):
                scores[number] = value
        return scores

    def close(self) -> None:
        del self.model


def _sigmoid(value: float) -> float:
    # Without overflow for scores that are far below the mean.
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def reward_input(
    template: ChatTokenizer, messages: Sequence[Mapping[str, Any]], text: str, finished: bool
) -> list[int]:
    """Returns the token ids of messages, the answer to them, and the token whose probability is the reward.

    Names of special tokens in all texts are ordinary text: an answer neither ends its turn nor opens another, and
    reasoning is read as it is written.
    """
    ids = [*template.encode_question(messages), *template.encode_text(text)]
    return [*ids, *([template.turn_end] if finished else []), template.end]
