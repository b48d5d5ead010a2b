"""The algorithms of this project: advantages, the loss of a token, the mean of an update, and what each paper combines.

Advantages are functions of the rewards, [prompts, answers] each, of all prompts of a step that count. They are exactly
0 where all answers to a prompt have the same reward, and computed in fp32. Means are `Mean` of the registry; answers
that carry no loss, such as truncated ones, are not among those of an update. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.rl.algorithms.policy_gradient.registry import Algorithm, Tokens

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


class OverTokens:
    """The mean over all tokens of the update: each token weighs the same (DAPO, arXiv 2503.14476)."""

    def weight(self, length: int) -> float:
        return 1.0

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return sum(lengths)


class OverAnswers:
    """The mean over answers of the mean over their tokens: each answer weighs the same (GRPO, arXiv 2402.03300)."""

    def weight(self, length: int) -> float:
        return 1.0 / length

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths)


class OfSums:
    """The mean over answers of the sum over their tokens: an answer is one action (RLOO, arXiv 2402.14740)."""

    def weight(self, length: int) -> float:
        return 1.0

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths)


class ByConstant(OfSums):
    """The mean of sums by the constant maximum length: no answer's length changes the weight of its tokens, nor that
    of others (Dr. GRPO, arXiv 2503.20783)."""

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths) * max_length


def clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns PPO's clipped surrogate (arXiv 1707.06347), with a lower and an upper range of its own, and whether the
    clip acted."""
    unclipped = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -unclipped.minimum(limited), limited < unclipped


def by_token(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips the ratio of each token (PPO)."""
    return clipped(tokens.ratio, tokens.advantages, clip_low, clip_high)


def by_answer(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips one ratio per answer, the geometric mean of its tokens' ratios (GSPO). In a mixture of experts the ratio of
    a single token jumps when its experts change; that of the answer does not."""
    length = tokens.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (tokens.log_ratio.sum(1, keepdim=True) / length).exp().expand_as(tokens.ratio)
    return clipped(ratio, tokens.advantages, clip_low, clip_high)


def bounded_weight(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds the weight of a token instead of stopping its gradient, so that rare tokens of a good answer still count
    (CISPO)."""
    weight = tokens.ratio.detach().clamp(max=1 + clip_high)
    return -weight * tokens.advantages * tokens.logprobs, (tokens.ratio > 1 + clip_high) & (tokens.advantages > 0)


def without_ratio(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain policy gradient (RLOO)."""
    return -tokens.advantages * tokens.logprobs, tokens.mask.new_zeros(tokens.mask.shape)


DAPO_CENTERED = Algorithm(centered, by_token, OverTokens(), clip_low=0.2, clip_high=0.28)
"""The token-level loss and asymmetric clip of DAPO on the centered rewards of Dr. GRPO: advantages are not divided by
the deviation of their group. The default."""
DAPO = Algorithm(scaled, by_token, OverTokens(), clip_low=0.2, clip_high=0.28)
"""DAPO (arXiv 2503.14476): GRPO with the mean over all tokens of the update and a wider upper clip."""
GRPO = Algorithm(scaled, by_token, OverAnswers(), clip_low=0.2, clip_high=0.2)
"""GRPO (DeepSeekMath, arXiv 2402.03300): rewards standardized by their group, PPO's clip, the mean over answers of the
mean over tokens."""
DR_GRPO = Algorithm(centered, by_token, ByConstant(), clip_low=0.2, clip_high=0.2)
"""Dr. GRPO (arXiv 2503.20783): GRPO without the two biases that it found, the division by the deviation of the group
and the division by the length of the answer."""
GSPO = Algorithm(scaled, by_answer, OverAnswers(), clip_low=3e-4, clip_high=4e-4)
"""GSPO (arXiv 2507.18071): GRPO with one ratio per answer. The ranges are those of the paper's section 5.1."""
CISPO = Algorithm(scaled, bounded_weight, OverTokens(), clip_low=None, clip_high=4.0)
"""CISPO (MiniMax-M1, arXiv 2506.13585). There is no lower clip; the paper leaves the upper one open, and 1 + 4 is among
the values of ScaleRL (arXiv 2510.13786)."""
RLOO = Algorithm(leave_one_out, without_ratio, OfSums(), clip_low=None, clip_high=None, updates=False)
"""RLOO (arXiv 2402.14740): REINFORCE with the mean reward of the other answers to the prompt as its baseline. An answer
is one action, so the loss is summed over its tokens; without a ratio, a step is one update."""
REINFORCE_PP = Algorithm(batch_scaled, by_token, OverAnswers(), clip_low=0.2, clip_high=0.2)
"""REINFORCE++ with baseline (arXiv 2501.03262), the variant for several answers to a prompt: rewards are centered by
their group and divided by the deviation of the whole batch, under PPO's clip."""
