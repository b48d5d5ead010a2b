"""The losses of reinforcement learning and preference learning: pure functions of tensors, tested against TRL's.

Log-probabilities are of the drawn tokens, [rows, width], one row per completion; a mask of the same shape is true where
a token counts. A value under a false mask, even NaN, changes neither loss nor gradient. Losses and figures are sums in
fp32, so that micro-batches and ranks add up; the caller divides by the count of the global batch. A figure whose name
begins with `max_` combines by the maximum instead.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from stages.rl.algorithms.policy_gradient.algorithms import by_token
from stages.rl.algorithms.policy_gradient.registry import TokenLoss, Tokens

Figures = dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    token_loss: TokenLoss = by_token,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    tis_cap: float = 2.0,
    old_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, Figures]:
    """The sum of the tokens' losses, each by the weight of its row, and figures.

    token_loss: the loss of a token (stages/rl/algorithms/policy_gradient), by default PPO's with the ranges of DAPO.
    The ratio is to `old_logprobs`, the trainer's before the first update on this batch (None: this is the first
    update). As the sampler's distribution is not quite the trainer's, each token is weighted by
    min(exp(old - sampler), tis_cap): truncated importance sampling (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training").
    With `reference_logprobs`, kl_coef times the k3 estimate (joschu.net/blog/kl-approx.html) of KL(policy || reference)
    is added to each token's loss, as in GRPO (arXiv 2402.03300, eq. 4).

    logprobs (with gradient), sampler_logprobs, old_logprobs, reference_logprobs, mask: [rows, width]. advantages:
    [rows], or [rows, width] where they differ by token. weights: [rows], by default 1.
    Figures, without the rows' weights: `tokens`; `clip_fraction`, tokens on which the clip acted; `ratio`;
    `importance_ratio` and `truncated`, tokens at the cap; `sampler_gap` and `max_sampler_gap`, |old - sampler|;
    `sampler_kl`, the k3 estimate of KL(sampler || old); with a reference, `kl`.
    """
    mask = mask.bool()
    current = _masked(logprobs, mask)
    old = current.detach() if old_logprobs is None else _masked(old_logprobs, mask).detach()
    gap = old - _masked(sampler_logprobs, mask).detach()
    weight = gap.exp().clamp(max=tis_cap)
    token_advantages = (advantages if advantages.dim() == 2 else advantages[:, None]).float()
    log_ratio = current - old
    ratio = log_ratio.exp()
    tokens = Tokens(current, log_ratio, ratio, token_advantages.expand_as(current), mask)
    loss, clipped = token_loss(tokens, clip_low, clip_high)
    loss = loss * weight
    figures = {
        "tokens": mask,
        "clip_fraction": clipped,
        "ratio": ratio,
        "importance_ratio": weight,
        "truncated": gap > math.log(tis_cap),
        "sampler_gap": gap.abs(),
        "sampler_kl": gap.expm1() - gap,
    }
    if reference_logprobs is not None:
        distance = _masked(reference_logprobs, mask).detach() - current
        figures["kl"] = distance.expm1() - distance
        loss = loss + kl_coef * figures["kl"]
    if weights is not None:
        loss = loss * weights[:, None]
    sums = {name: (figure.detach().float() * mask).sum() for name, figure in figures.items()}
    sums["max_sampler_gap"] = (gap.abs() * mask).amax() if gap.numel() else gap.new_zeros(())
    return torch.where(mask, loss, 0.0).sum(), sums


def dpo_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor | None,
    mask: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, Figures]:
    """The sum over pairs of -log sigmoid(beta * (score of chosen - score of rejected)), and figures.

    Rows 2i and 2i + 1 are the chosen and the rejected answer of a pair. A row's score is the mean over its tokens of
    log-probability less the reference's: length-normalized DPO (Tulu 3, arXiv 2411.15124). With no reference it is
    SimPO's loss without its target margin (arXiv 2405.14734), and for rows of one column that hold a reward model's
    score, with beta 1, the Bradley-Terry loss (arXiv 2203.02155).

    logprobs (with gradient), reference_logprobs, mask: [2 * pairs, width]. A row without tokens scores 0.
    Figures: `pairs`; `accuracy`, pairs whose chosen answer scores higher; `margin`, beta times the difference; `chosen`
    and `rejected`, beta times the scores.
    Raises ValueError if the rows are not pairs.
    """
    if len(logprobs) % 2:
        raise ValueError(f"{len(logprobs)} rows are not pairs of a chosen and a rejected answer")
    mask = mask.bool()
    score = _masked(logprobs, mask)
    if reference_logprobs is not None:
        score = score - _masked(reference_logprobs, mask).detach()
    chosen, rejected = (beta * score.sum(1) / mask.sum(1).clamp(min=1)).unflatten(0, (len(score) // 2, 2)).unbind(1)
    margins = chosen - rejected
    figures = {
        "pairs": torch.ones_like(margins),
        "accuracy": margins > 0,
        "margin": margins,
        "chosen": chosen,
        "rejected": rejected,
    }
    sums = {name: figure.detach().float().sum() for name, figure in figures.items()}
    return -logsigmoid(margins).sum(), sums


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values in fp32, with 0 under a false mask: NaN times 0 would be NaN, in the gradient too."""
    return torch.where(mask, values.float(), 0.0)
