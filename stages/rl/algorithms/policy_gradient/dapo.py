"""DAPO (arXiv 2503.14476): GRPO with the mean over all tokens of the update and a wider upper clip."""

from __future__ import annotations

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm

ALGORITHM = Algorithm(advantages.scaled, clip.token_loss, means.OverTokens(), clip_low=0.2, clip_high=0.28)
