"""REINFORCE++ with baseline (arXiv 2501.03262), the variant for several answers to a prompt: rewards are centered by
their group and divided by the deviation of the whole batch, under PPO's clip."""

from __future__ import annotations

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm

ALGORITHM = Algorithm(advantages.batch_scaled, clip.token_loss, means.OverAnswers(), clip_low=0.2, clip_high=0.2)
