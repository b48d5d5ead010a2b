"""Dr. GRPO (arXiv 2503.20783): GRPO without the two biases that it found, the division by the deviation of the group
and the division by the length of the answer."""

from __future__ import annotations

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm

ALGORITHM = Algorithm(advantages.centered, clip.token_loss, means.ByConstant(), clip_low=0.2, clip_high=0.2)
