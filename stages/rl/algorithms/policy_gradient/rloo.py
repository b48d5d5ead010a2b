"""RLOO (arXiv 2402.14740): REINFORCE with the mean reward of the other answers to the prompt as its baseline. An answer
is one action, so the loss is summed over its tokens; without a ratio, a step is one update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.rl.algorithms.policy_gradient import advantages, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm, Tokens

if TYPE_CHECKING:
    import torch


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return -tokens.advantages * tokens.logprobs, tokens.mask.new_zeros(tokens.mask.shape)


ALGORITHM = Algorithm(
    advantages.leave_one_out, token_loss, means.OfSums(), clip_low=None, clip_high=None, updates=False
)
