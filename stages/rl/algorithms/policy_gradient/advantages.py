"""Advantages of answers from their rewards: [prompts, answers] each, the rewards of all prompts of a step that count.

Every one is exactly 0 where all answers to a prompt have the same reward. Computed in fp32; no torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TINY = 1e-4
"""Added to the standard deviation of a group, as TRL does: rewards that hardly differ are no signal."""


def zero_variance(rewards: torch.Tensor) -> torch.Tensor:
    """[prompts]: whether all answers to a prompt have the same reward, so that it carries no signal."""
    return (rewards == rewards[:, :1]).all(1)


def centered(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards less the mean of their group; not divided by its standard deviation, which would favor groups of nearly
    equal rewards (Dr. GRPO, arXiv 2503.20783)."""
    rewards = rewards.float()
    # The rounded mean of equal rewards can differ from that reward; a group without signal must keep advantage 0.
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(zero_variance(rewards)[:, None], 0.0)


def scaled(rewards: torch.Tensor) -> torch.Tensor:
    """Centered rewards by the standard deviation of their group, with n - 1 (GRPO, arXiv 2402.03300)."""
    return centered(rewards) / (rewards.float().std(1, keepdim=True) + TINY)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards less the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    samples = rewards.shape[1]
    return centered(rewards) * (samples / (samples - 1))


def batch_scaled(rewards: torch.Tensor) -> torch.Tensor:
    """Centered rewards by their standard deviation over the whole batch (REINFORCE++ with baseline, arXiv 2501.03262).

    Their mean over the batch is 0, so that it needs not be subtracted. Without any signal they stay 0.
    """
    gains = centered(rewards)
    deviation = gains.std()
    return gains / deviation if deviation > 0 else gains
