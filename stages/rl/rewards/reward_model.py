"""Verifier `reward-model`: an exported reward model, trained on pairs of answers. Parts: `reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.errors import AtomError, RecipeError
from stages.formats.chat import control_tokens
from stages.rl.protocols import Answer, ChatTokenizer, NoSettings, Parts, Verifier, VerifierContext, VerifierFailed
from stages.tasks import messages_of

# Answers that are scored at once, on a core and on a GPU: all of their tokens have logits.
ROWS, GPU_ROWS = 64, 8


class RewardModel(Verifier):
    """The score of an answer is the log-probability that `<|endoftext|>` follows it.

    The reward is the probability, by Bradley and Terry, that the answer is preferred to one of mean score; it is 0
    for an answer with special tokens that does not fit the context once these are written out.
    """

    name = "reward-model"

    def __init__(self, context: VerifierContext[NoSettings]) -> None:
        """Loads the export inputs["reward_model"].

        Its training, inputs["reward"], measured the mean score of held-out pairs.

        Raises:
            RecipeError: The inputs are missing.
            AtomError: The export has another tokenizer than the policy.
        """
        if "reward" not in context.inputs:
            raise RecipeError(
                "tasks name the verifier reward-model, which only online_rlhf has; use another reward function"
            )
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        from stages.mcore import gpu

        assert context.chat is not None, "a phase has a tokenizer"
        artifact = context.inputs["reward_model"]
        read_by = Tokenizer.from_file(str(artifact / "model" / "tokenizer.json"))
        if read_by.to_str() != context.chat.tokenizer.to_str():
            raise AtomError(
                f"the reward model {artifact.key} has another tokenizer than the policy, whose answers it cannot read; "
                "train it on pairs of this policy"
            )
        self.device = gpu.start()  # that of the rank, beside the policy
        self.model = (
            AutoModelForCausalLM.from_pretrained(artifact / "model", dtype=torch.float32, local_files_only=True)
            .to(self.device)
            .eval()
        )
        self.chat, self.version = context.chat, artifact.key
        self.center: float = context.inputs["reward"].json("summary.json")["centre"]

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        import torch

        rows = [
            # Without the last token, whose probability is the score.
            reward_input(self.chat, messages_of(row), response.text, response.finished)[:-1]
            for row, response in answers
        ]
        limit = self.model.config.max_position_embeddings
        rewards: list[float] = [0.0] * len(rows)
        for (row, response), ids in zip(answers, rows, strict=True):
            # A special token that is written out takes many tokens, so such an answer is too long by its own fault.
            if response.finished and len(ids) > limit and not control_tokens(response.text):
                raise VerifierFailed(
                    f"verifier {self.name} cannot score row {row['id']}: {len(ids)} tokens are more than its context "
                    f"of {limit}; allow shorter answers"
                )
        # Rows of similar length share a batch, so that little of it is padding.
        order = sorted((i for i in range(len(rows)) if len(rows[i]) <= limit), key=lambda i: (len(rows[i]), i))
        rows_at_once = ROWS if self.device.type == "cpu" else GPU_ROWS
        for start in range(0, len(order), rows_at_once):
            batch = order[start : start + rows_at_once]
            last = torch.tensor([len(rows[i]) - 1 for i in batch])
            width = int(last.max()) + 1
            # Padding on the right changes nothing before it, since attention is causal.
            padded = torch.tensor([[*rows[i], *[self.chat.pad] * (width - len(rows[i]))] for i in batch])
            with torch.inference_mode():
                logits = self.model(padded.to(self.device)).logits[torch.arange(len(batch)), last.to(self.device)].cpu()
            scores = torch.log_softmax(logits.double(), -1)[:, self.chat.end]
            probabilities = torch.sigmoid(scores - self.center).tolist()
            for i, probability in zip(batch, probabilities, strict=True):
                rewards[i] = probability if answers[i][1].finished else 0.0
        return [{"reward": probability} for probability in rewards]

    def close(self) -> None:
        del self.model


def reward_input(
    template: ChatTokenizer, messages: Sequence[Mapping[str, Any]], text: str, finished: bool
) -> list[int]:
    """Returns the token ids of messages, the answer to them, and the token whose probability is the reward.

    Names of special tokens in all texts are ordinary text: an answer neither ends its turn nor opens another, and
    reasoning is read as it is written.
    """
    ids = [*template.encode_question(messages), *template.encode_text(text)]
    return [*ids, *([template.turn_end] if finished else []), template.end]
