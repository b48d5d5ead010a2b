"""GRPO (DeepSeekMath, arXiv 2402.03300): rewards standardized by their group, PPO's clip, the mean over answers of the
mean over tokens."""

from __future__ import annotations

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm

ALGORITHM = Algorithm(advantages.scaled, clip.token_loss, means.OverAnswers(), clip_low=0.2, clip_high=0.2)
