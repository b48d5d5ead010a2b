"""The token-level loss and asymmetric clip of DAPO (arXiv 2503.14476) on the centered rewards of Dr. GRPO (arXiv
2503.20783): advantages are not divided by the deviation of their group. The default."""

from __future__ import annotations

from stages.rl.algorithms.policy_gradient import advantages, clip, means
from stages.rl.algorithms.policy_gradient.registry import Algorithm

ALGORITHM = Algorithm(advantages.centered, clip.token_loss, means.OverTokens(), clip_low=0.2, clip_high=0.28)
