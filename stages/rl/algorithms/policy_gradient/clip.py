"""PPO's clipped surrogate (arXiv 1707.06347) by token, with a lower and an upper range of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.rl.algorithms.policy_gradient.registry import Tokens

if TYPE_CHECKING:
    import torch


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return surrogate(tokens.ratio, tokens.advantages, clip_low, clip_high)


def surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and whether the clip acted."""
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -unclipped.minimum(clipped), clipped < unclipped
