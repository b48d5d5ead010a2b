"""The policy losses by name (`loss_type` of a phase of reinforcement learning). A new one is a file in this folder and
a line here.

The file defines `token_loss` (see `TokenLoss`). stages/rl/algorithms/losses.py adds what all have in common: masks,
truncated importance sampling, the KL penalty and the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

POLICY_LOSSES = {
    "dapo": "stages.rl.algorithms.policy_losses.dapo",
    "cispo": "stages.rl.algorithms.policy_losses.cispo",
}
DEFAULT = "dapo"


@dataclass(frozen=True)
class Tokens:
    """The drawn tokens of a batch, one row per completion: fp32 [rows, width], 0 where the mask is false.

    logprobs: under the policy, with gradient. ratio: of its probabilities to those before the first update on this
    batch, with gradient. advantages: of each token. mask: bool, true where a token counts.
    """

    logprobs: torch.Tensor
    ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


class TokenLoss(Protocol):
    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of each token, whether the clip acted on it), both [rows, width]."""


def load(name: str) -> TokenLoss:
    """The policy loss of that name. Imports torch."""
    loss: TokenLoss = import_module(POLICY_LOSSES[name]).token_loss
    return loss
