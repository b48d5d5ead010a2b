"""GSPO (arXiv 2507.18071): GRPO with one ratio per answer, the geometric mean of its tokens' ratios, and a clip on it.

In a mixture of experts the ratio of a single token jumps when its experts change; that of the answer does not. The
ranges are those of the paper's section 5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm, Tokens

if TYPE_CHECKING:
    import torch


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    length = tokens.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (tokens.log_ratio.sum(1, keepdim=True) / length).exp().expand_as(tokens.ratio)
    return clip.surrogate(ratio, tokens.advantages, clip_low, clip_high)


ALGORITHM = Algorithm(advantages.scaled, token_loss, means.OverAnswers(), clip_low=3e-4, clip_high=4e-4)
