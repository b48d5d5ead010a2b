"""CISPO (MiniMax-M1, arXiv 2506.13585): the clip bounds the weight of a token instead of stopping its gradient, so that
rare tokens of a good answer still count. There is no lower clip; the paper leaves the upper one open, and 1 + 4 is
among the values of ScaleRL (arXiv 2510.13786).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.rl.algorithms.policy_gradient import advantages, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm, Tokens

if TYPE_CHECKING:
    import torch


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight = tokens.ratio.detach().clamp(max=1 + clip_high)
    return -weight * tokens.advantages * tokens.logprobs, (tokens.ratio > 1 + clip_high) & (tokens.advantages > 0)


ALGORITHM = Algorithm(advantages.scaled, token_loss, means.OverTokens(), clip_low=None, clip_high=4.0)
