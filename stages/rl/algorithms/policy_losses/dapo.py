"""PPO's clipped surrogate by token, with the wider upper clip of DAPO (arXiv 2503.14476). Divided by the unmasked
tokens of the whole batch it is DAPO's token-level loss.
"""

from __future__ import annotations

import torch

from stages.rl.algorithms.policy_losses.registry import Tokens


def token_loss(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    unclipped = tokens.ratio * tokens.advantages
    clipped = tokens.ratio.clamp(1 - clip_low, 1 + clip_high) * tokens.advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped
