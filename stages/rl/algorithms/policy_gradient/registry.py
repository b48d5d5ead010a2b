"""The policy-gradient algorithms by name (`algorithm` of a phase of reinforcement learning). A new one is a file in
this folder and a line here.

The file defines an `Algorithm` and imports no torch, since a recipe is checked without it.
stages/rl/algorithms/losses.py adds what all have in common: masks, truncated importance sampling, the KL term and the
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

ALGORITHMS = {
    "dapo-centered": "stages.rl.algorithms.policy_gradient.algorithms:DAPO_CENTERED",
    "dapo": "stages.rl.algorithms.policy_gradient.algorithms:DAPO",
    "grpo": "stages.rl.algorithms.policy_gradient.algorithms:GRPO",
    "dr-grpo": "stages.rl.algorithms.policy_gradient.algorithms:DR_GRPO",
    "gspo": "stages.rl.algorithms.policy_gradient.algorithms:GSPO",
    "cispo": "stages.rl.algorithms.policy_gradient.algorithms:CISPO",
    "rloo": "stages.rl.algorithms.policy_gradient.algorithms:RLOO",
    "reinforce++": "stages.rl.algorithms.policy_gradient.algorithms:REINFORCE_PP",
}
DEFAULT = "dapo-centered"


@dataclass(frozen=True)
class Tokens:
    """The drawn tokens of a batch, one row per completion: fp32 [rows, width], 0 where the mask is false.

    logprobs: under the policy, with gradient. log_ratio: less the log-probabilities before the first update on these
    answers, with gradient; ratio: its exponential. advantages: of each token. mask: bool, true where a token counts.
    """

    logprobs: torch.Tensor
    log_ratio: torch.Tensor
    ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


class TokenLoss(Protocol):
    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of each token, whether the clip acted on it), both [rows, width]. An infinite range does not clip."""


class Mean(Protocol):
    """How an update averages the losses of its answers' tokens: the sum of weight x loss, by a divisor."""

    def weight(self, length: int) -> float:
        """The weight of each token of an answer of `length` tokens."""

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        """lengths: tokens of the answers of an update; max_length: the limit of an answer."""


@dataclass(frozen=True)
class Algorithm:
    """advantages: rewards [prompts, answers] of a step -> the advantage of each answer, 0 where all answers to a prompt
    have the same reward. token_loss, mean: of an update. clip_low, clip_high: the default ranges of the clip; None:
    there is no such clip. updates: whether a step may take several, which the loss must correct by its ratio."""

    advantages: Callable[[torch.Tensor], torch.Tensor]
    token_loss: TokenLoss
    mean: Mean
    clip_low: float | None
    clip_high: float | None
    updates: bool = True


def load(name: str) -> Algorithm:
    """Returns the algorithm of that name. Imports no torch."""
    algorithm: Algorithm = resolve_name(ALGORITHMS[name])
    return algorithm
