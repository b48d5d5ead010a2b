"""CISPO (MiniMax-M1, arXiv 2506.13585): the clip bounds the weight of a token instead of stopping its gradient, so that
rare tokens of a good answer still count. There is no lower clip.
"""

from __future__ import annotations

import torch

from stages.rl.algorithms.policy_losses.registry import Tokens


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight = tokens.ratio.detach().clamp(max=1 + clip_high)
    return -weight * tokens.advantages * tokens.logprobs, (tokens.ratio > 1 + clip_high) & (tokens.advantages > 0)
