"""The policy-gradient algorithms by name (`algorithm` of a phase of reinforcement learning).

A new algorithm is a file in this folder that defines an `Algorithm`, and a line in `ALGORITHMS`. The file imports no
torch, since a recipe is checked without it. stages/rl/algorithms/losses.py adds what all algorithms share: masks,
truncated importance sampling, the KL term and the figures.

An algorithm combines advantages, the loss of a token, and the mean of an update. Each has several forms below. The
packaged advantages read the rewards alone: they are 0 where all answers to a prompt have the same reward, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.extensions import extend, imported

if TYPE_CHECKING:
    import torch

ALGORITHMS = {
    "dapo-centered": "stages.rl.algorithms.policy_gradient:DAPO_CENTERED",
    "dapo": "stages.rl.algorithms.policy_gradient:DAPO",
    "grpo": "stages.rl.algorithms.policy_gradient:GRPO",
    "dr-grpo": "stages.rl.algorithms.policy_gradient:DR_GRPO",
    "gspo": "stages.rl.algorithms.policy_gradient:GSPO",
    "cispo": "stages.rl.algorithms.policy_gradient:CISPO",
}
extend("algorithms", ALGORITHMS)
DEFAULT = "dapo-centered"
# Added to the standard deviation of a group, as TRL does: rewards that hardly differ are no signal.
TINY = 1e-4


@dataclass(frozen=True)
class Tokens:
    """The drawn tokens of a batch, one row per answer: fp32 [rows, width], 0 where the mask is false.

    Attributes:
        logprobs: Log-probabilities under the policy, with gradient.
        log_ratio: `logprobs` less those before the first update on these answers, with gradient.
        ratio: Exponential of `log_ratio`.
        advantages: Advantage of each token.
        mask: bool; true where a token counts.
    """

    logprobs: torch.Tensor
    log_ratio: torch.Tensor
    ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


class Advantages(Protocol):
    """The advantages of the answers of a step."""

    def __call__(self, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the advantage of each answer, [prompts, answers].

        Args:
            rewards: fp32 [prompts, answers], of all prompts of the step whose answers differ in reward.
            lengths: int64 [prompts, answers], the tokens of each answer that the policy drew. A truncated answer has
                the maximum length; it counts here, although no update reads it.
        """


class TokenLoss(Protocol):
    """The loss of a token."""

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of each token, and where the clip acted, both [rows, width]. Infinite: no clip."""


@dataclass(frozen=True)
class Mean:
    """The mean over the tokens of an update: the sum of weight times loss, by a divisor.

    Attributes:
        weight: Function of an answer's tokens that returns the weight of each of them.
        divisor: Function that returns the divisor of an update. Its arguments are the tokens of each answer of the
            update, without truncated answers, which carry no loss, and the maximum length of an answer.
    """

    weight: Callable[[int], float]
    divisor: Callable[[Sequence[int], int], int]


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient algorithm.

    Attributes:
        advantages: Advantages of the answers of a step.
        token_loss: Loss of a token.
        mean: Mean over the tokens of an update.
        clip_low: Default lower range of the clip; None if there is no such clip.
        clip_high: Default upper range of the clip; None if there is no such clip.
    """

    advantages: Advantages
    token_loss: TokenLoss
    mean: Mean
    clip_low: float | None
    clip_high: float | None


def load(name: str) -> Algorithm:
    """Returns the algorithm of that name, without importing torch."""
    algorithm: Algorithm = imported(ALGORITHMS[name])
    return algorithm


# Advantages. Their second argument is there for algorithms that weigh answers by length.


def zero_variance(rewards: torch.Tensor) -> torch.Tensor:
    """Returns a bool for each prompt: all answers have the same reward, so that it carries no signal."""
    return (rewards == rewards[:, :1]).all(1)


def centered(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns the rewards less the mean of their group.

    There is no division by the standard deviation, which would favor groups of nearly equal rewards (Dr. GRPO,
    arXiv 2503.20783).
    """
    rewards = rewards.float()
    # The rounded mean of equal rewards can differ from that reward; a group without signal must keep advantage 0.
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(zero_variance(rewards)[:, None], 0.0)


def scaled(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns centered rewards by the standard deviation of their group, with n - 1 (GRPO, arXiv 2402.03300)."""
    return centered(rewards, lengths) / (rewards.float().std(1, keepdim=True) + TINY)


# Means.

# Over all tokens of the update: each token weighs the same (DAPO, arXiv 2503.14476).
OVER_TOKENS = Mean(lambda length: 1.0, lambda lengths, max_length: sum(lengths))
# Over answers of the mean over their tokens: each answer weighs the same (GRPO, arXiv 2402.03300).
OVER_ANSWERS = Mean(lambda length: 1.0 / length, lambda lengths, max_length: len(lengths))
# Over answers of the sum over their tokens, by the constant maximum length: no length changes the weight of a token of
# its answer, nor that of others (Dr. GRPO, arXiv 2503.20783).
BY_CONSTANT = Mean(lambda length: 1.0, lambda lengths, max_length: len(lengths) * max_length)


# Losses of a token.


def clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns PPO's clipped surrogate (arXiv 1707.06347) with separate ranges, and where the clip acted."""
    unclipped = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -unclipped.minimum(limited), limited < unclipped


def by_token(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips the ratio of each token (PPO)."""
    return clipped(tokens.ratio, tokens.advantages, clip_low, clip_high)


def by_answer(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips one ratio per answer, the geometric mean of its tokens' ratios (GSPO).

    In a mixture of experts the ratio of a single token jumps when its experts change; that of the answer does not.
    """
    # A row without tokens has no mean; 1 avoids a division by 0.
    length = tokens.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (tokens.log_ratio.sum(1, keepdim=True) / length).exp().expand_as(tokens.ratio)
    return clipped(ratio, tokens.advantages, clip_low, clip_high)


def bounded_weight(tokens: Tokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds the weight of a token instead of stopping its gradient (CISPO): rare tokens of a good answer count."""
    weight = tokens.ratio.detach().clamp(max=1 + clip_high)
    return -weight * tokens.advantages * tokens.logprobs, (tokens.ratio > 1 + clip_high) & (tokens.advantages > 0)


# The token-level loss and asymmetric clip of DAPO on the centered rewards of Dr. GRPO. The default.
DAPO_CENTERED = Algorithm(centered, by_token, OVER_TOKENS, clip_low=0.2, clip_high=0.28)
# DAPO (arXiv 2503.14476): GRPO with the mean over all tokens of the update and a wider upper clip.
DAPO = Algorithm(scaled, by_token, OVER_TOKENS, clip_low=0.2, clip_high=0.28)
# GRPO (DeepSeekMath, arXiv 2402.03300): rewards standardized by their group, PPO's clip, the mean over answers of the
# mean over tokens.
GRPO = Algorithm(scaled, by_token, OVER_ANSWERS, clip_low=0.2, clip_high=0.2)
# Dr. GRPO (arXiv 2503.20783): GRPO without the two biases that it found, the division by the deviation of the group and
# the division by the length of the answer.
DR_GRPO = Algorithm(centered, by_token, BY_CONSTANT, clip_low=0.2, clip_high=0.2)
# GSPO (arXiv 2507.18071): GRPO with one ratio per answer. The ranges are those of the paper's section 5.1.
GSPO = Algorithm(scaled, by_answer, OVER_ANSWERS, clip_low=3e-4, clip_high=4e-4)
# CISPO (MiniMax-M1, arXiv 2506.13585). There is no lower clip; the paper leaves the upper one open, and 1 + 4 is among
# the values of ScaleRL (arXiv 2510.13786).
CISPO = Algorithm(scaled, bounded_weight, OVER_TOKENS, clip_low=None, clip_high=4.0)
