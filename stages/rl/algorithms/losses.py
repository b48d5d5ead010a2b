"""The losses of reinforcement learning and preference learning: pure functions of tensors, tested against TRL's.

Log-probabilities are of the drawn tokens, [rows, width], one row per completion; a mask of the same shape is true where
a token counts. A value under a false mask, even NaN, changes neither loss nor gradient. Losses and figures are sums in
fp32, so that micro-batches and ranks add up; the caller divides by the count of the global batch. A figure whose name
begins with `max_` combines by the maximum instead.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from stages.rl.algorithms.policy_gradient import TokenLoss, Tokens, by_token

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
    row_weights: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, Figures]:
    """Returns the sum of the tokens' losses, each by the weight of its row, and figures summed over tokens.

    Args:
        logprobs: Log-probabilities under the policy, with gradient, [rows, width].
        sampler_logprobs: Log-probabilities under the distribution that the tokens were drawn from, [rows, width].
        advantages: [rows], or [rows, width] where they differ by token.
        mask: True where a token counts, [rows, width].
        token_loss: Loss of a token (stages/rl/algorithms/policy_gradient.py), by default PPO's.
        clip_low: Lower range of the clip; the defaults are those of DAPO.
        clip_high: Upper range of the clip.
        tis_cap: Cap of a token's importance weight.
        old_logprobs: The trainer's before the first update on this batch; None in that first update.
        row_weights: Loss weight of each row, [rows]; None for 1.
        reference_logprobs: Log-probabilities under the reference policy, [rows, width]; None for no KL term.
        kl_coef: Weight of the KL term.

    The figures, without the rows' weights, are: `tokens`; `clip_fraction`, tokens on which the clip acted;
    `importance_ratio`; `sampler_gap` and `max_sampler_gap`, |old - sampler|; with a reference, `kl`.
    """
    mask = mask.bool()
    current = _masked(logprobs, mask)
    # In the first update the policy is the one that drew, so its own values stand for the old ones, without gradient.
    old = current.detach() if old_logprobs is None else _masked(old_logprobs, mask).detach()

    # The sampler's distribution is not quite the trainer's. Truncated importance sampling corrects for it: each token
    # is weighted by min(exp(old - sampler), cap) (Yao et al. 2025, "Your efficient RL framework secretly brings you
    # off-policy RL training").
    sampler_log_ratio = old - _masked(sampler_logprobs, mask).detach()
    importance_weights = sampler_log_ratio.exp().clamp(max=tis_cap)

    log_ratio = current - old
    token_advantages = (advantages if advantages.dim() == 2 else advantages[:, None]).float()
    tokens = Tokens(current, log_ratio, log_ratio.exp(), token_advantages.expand_as(current), mask)
    loss, clipped = token_loss(tokens, clip_low, clip_high)
    loss = loss * importance_weights

    figures = {
        "tokens": mask,
        "clip_fraction": clipped,
        "importance_ratio": importance_weights,
        "sampler_gap": sampler_log_ratio.abs(),
    }
    if reference_logprobs is not None:
        # The k3 estimate (joschu.net/blog/kl-approx.html) of KL(policy || reference), added to the loss of each token
        # as in GRPO (arXiv 2402.03300, eq. 4).
        reference_log_ratio = _masked(reference_logprobs, mask).detach() - current
        figures["kl"] = reference_log_ratio.expm1() - reference_log_ratio
        loss = loss + kl_coef * figures["kl"]
    if row_weights is not None:
        # Last, so that the KL term has the weight of its row as well.
        loss = loss * row_weights[:, None]

    sums = {name: (figure.detach().float() * mask).sum() for name, figure in figures.items()}
    sums["max_sampler_gap"] = figures["sampler_gap"].new_zeros(())
    if mask.numel():  # amax of nothing is an error
        sums["max_sampler_gap"] = (figures["sampler_gap"] * mask).amax()
    return torch.where(mask, loss, 0.0).sum(), sums


def teacher_gaps(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns by how much each token is likelier under the policy than under a teacher: fp32 without gradient.

    Their negatives are the advantages of on-policy distillation. Over the tokens that a policy p draws, the mean of
    (log p - log teacher) times the gradient of log p is the gradient of KL(p || teacher), as that of the mean of log p
    is 0 (MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649). Each token answers for its own divergence alone, a discount
    of 0, which spares the noise of what comes after it (Thinking Machines, "On-Policy Distillation", 2025).

    Args:
        logprobs: Log-probabilities under the policy before its first update on these tokens, [rows, width].
        teacher_logprobs: Those under the teacher, [rows, width].
        mask: True where a token counts, [rows, width]; elsewhere the gap is 0.
    """
    mask = mask.bool()
    return (_masked(logprobs, mask) - _masked(teacher_logprobs, mask)).detach()


def dpo_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor | None,
    mask: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, Figures]:
    """Returns the sum over pairs of -log sigmoid(beta * (score of chosen - score of rejected)), and figures.

    Rows 2i and 2i + 1 are the chosen and the rejected answer of a pair. A row's score is the mean over its tokens of
    log-probability less the reference's: length-normalized DPO (Tulu 3, arXiv 2411.15124). Without a reference it is
    SimPO's loss without its target margin (arXiv 2405.14734). With beta 1 and rows of one column that hold a reward
    model's score, it is the Bradley-Terry loss (arXiv 2203.02155).

    Args:
        logprobs: Log-probabilities under the policy, with gradient, [2 * pairs, width].
        reference_logprobs: Those under the reference, [2 * pairs, width]; None for none.
        mask: True where a token counts, [2 * pairs, width]. A row without tokens scores 0.
        beta: Scale of the difference of scores.

    The figures are: `pairs`; `accuracy`, pairs whose chosen answer scores higher; `margin`, beta times the difference;
    `chosen` and `rejected`, beta times the scores.

    Raises:
        ValueError: The rows are not pairs.
    """
    if len(logprobs) % 2:
        raise ValueError(f"{len(logprobs)} rows are not pairs of a chosen and a rejected answer")
    mask = mask.bool()
    score = _masked(logprobs, mask)
    if reference_logprobs is not None:
        score = score - _masked(reference_logprobs, mask).detach()
    scores = beta * score.sum(1) / mask.sum(1).clamp(min=1)  # the mean over tokens, so long answers win nothing by it
    chosen, rejected = scores.unflatten(0, (len(score) // 2, 2)).unbind(1)
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
    """Returns the values in fp32, with 0 under a false mask."""
    # Not a product with the mask: NaN times 0 is NaN, in the gradient too.
    return torch.where(mask, values.float(), 0.0)
