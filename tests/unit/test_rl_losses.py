"""The losses by hand and by their properties; tests/integration/rl/test_trl_losses.py compares them with TRL's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.algorithms import policy_gradient
from stages.rl.algorithms.losses import dpo_loss, policy_loss, teacher_gaps
from stages.rl.algorithms.policy_gradient import zero_variance
from tests.fixtures.loss_fixtures import CLOSE, batch, with_gradient

pytestmark = pytest.mark.numeric

# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "gain", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, -2.56, 1),  # a good token already made likelier: held at 1.28
        (0.5, 2.0, -1.0, 0),
        (0.5, -2.0, 1.6, 1),  # a bad token already made less likely: held at 0.8
        (1.5, -2.0, 3.0, 0),
    ],
)
def test_one_token_by_hand(ratio: float, gain: float, loss: float, clipped: int) -> None:
    old = torch.tensor([[-3.0]])
    logprob = old + math.log(ratio)
    value, figures = policy_loss(logprob, old, torch.tensor([gain]), torch.ones(1, 1), old_logprobs=old)
    assert value.item() == pytest.approx(loss, rel=1e-6) and figures["clip_fraction"].item() == clipped


def test_the_samplers_weight_by_hand() -> None:
    """Weights 0.5, 1 and (3, held at the cap of) 2, on tokens whose ratio is 1 and advantage 1."""
    logprobs, weights = torch.full((1, 3), -2.0), torch.tensor([[0.5, 1.0, 3.0]])
    value, figures = policy_loss(logprobs, logprobs - weights.log(), torch.ones(1), torch.ones(1, 3))
    assert value.item() == pytest.approx(-3.5, rel=1e-6)
    assert figures["importance_ratio"].item() == pytest.approx(3.5, rel=1e-6)
    assert figures["max_sampler_gap"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert figures["sampler_gap"].item() == pytest.approx(math.log(3) + math.log(2), rel=1e-6)


def test_a_pair_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -3.0], [-4.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, figures = dpo_loss(logprobs, torch.tensor([[-2.0, -4.0], [-3.0, 0.0]]), mask, 0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))  # scores 1 and -1: beta times the difference is 1
    assert {name: figure.item() for name, figure in figures.items()} == pytest.approx(
        {"pairs": 1, "accuracy": 1, "margin": 1, "chosen": 0.5, "rejected": -0.5}
    )


@pytest.mark.parametrize("name", ["dapo-centered", "cispo", "gspo"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_teacher_gives_the_gradient_of_the_reverse_kl_divergence(name: str, off_policy: bool) -> None:
    """Exactly, over all answers of two tokens from a vocabulary of five, each by its probability; also if another
    policy drew them, by importance weights. Of the second token it is the divergence after each first one."""
    size, make = 5, torch.Generator().manual_seed(3)
    # The logits of the first token, and of the second after each first one.
    policy, teacher, drew = (torch.randn(1 + size, size, generator=make, dtype=torch.float64) for _ in range(3))
    policy.requires_grad_()
    p, q, mu = (logits.log_softmax(-1) for logits in (policy, teacher, drew if off_policy else policy.detach()))
    first, second = torch.cartesian_prod(torch.arange(size), torch.arange(size)).unbind(1)

    def of_answers(logprobs: torch.Tensor) -> torch.Tensor:
        return torch.stack([logprobs[0, first], logprobs[1 + first, second]], 1)

    mask = torch.ones(size**2, 2)
    gaps = teacher_gaps(of_answers(p), of_answers(q), mask)
    loss, _ = policy_loss(
        of_answers(p), of_answers(mu), -gaps, mask, tis_cap=math.inf,
        token_loss=policy_gradient.load(name).token_loss, clip_low=math.inf, clip_high=math.inf,
        row_weights=of_answers(mu).exp().prod(1),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, policy, retain_graph=True)

    divergences = (p.exp() * (p - q)).sum(-1)
    # Discount 0: no token answers for the divergence of later ones, so prefixes weigh as they were drawn.
    prefixes = torch.cat([torch.ones(1, dtype=torch.float64), mu[0].exp()])
    (expected,) = torch.autograd.grad((prefixes * divergences).sum(), policy)
    if name == "gspo":  # one ratio for an answer, so both of its tokens share the sum of their advantages
        assert not torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_the_policy_teaches_nothing_and_padding_is_not_read() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    teacher = torch.tensor([[-1.0, -2.5, math.nan]])
    mask = torch.tensor([[True, True, False]])
    gaps = teacher_gaps(logprobs, teacher, mask)
    assert gaps.tolist() == [[0.0, 0.5, 0.0]]  # the second token is too likely
    policy_loss(logprobs, logprobs.detach(), -gaps, mask)[0].backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.5, 0.0]]


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows are not pairs"):
        dpo_loss(torch.zeros(3, 2), None, torch.ones(3, 2), 0.1)


# --- properties -----------------------------------------------------------------------------------------------------

batches = st.builds(batch, st.sampled_from([2, 4, 6]), st.integers(1, 9), st.integers(0, 10_000))
quick = settings(max_examples=40, deadline=None)


def policy_arguments(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in b.items() if name != "reference_logprobs"}


def policy(b: dict[str, torch.Tensor], **settings: Any) -> Any:
    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return policy_loss(**{**policy_arguments(b), "logprobs": logprobs}, **settings)[0]

    return with_gradient(loss, b["logprobs"])


def preference(b: dict[str, torch.Tensor]) -> Any:
    return with_gradient(lambda lp: dpo_loss(lp, b["reference_logprobs"], b["mask"], 2.0)[0], b["logprobs"])


@pytest.mark.parametrize("name", policy_gradient.ALGORITHMS)
@quick
@given(
    rewards=st.lists(st.lists(st.integers(-99, 99), min_size=4, max_size=4), min_size=1, max_size=5),
    equal=st.floats(-1e3, 1e3, width=32),
)
def test_advantages_sum_to_nothing_and_equal_rewards_give_exactly_none(
    name: str, rewards: list[list[int]], equal: float
) -> None:
    """Of fourths, whose mean of four is exact: a deviation that is only rounding would be divided by itself."""
    advantages = policy_gradient.load(name).advantages
    given_rewards = torch.tensor([*([n / 4 for n in group] for group in rewards), [equal] * 4])
    lengths = torch.ones(given_rewards.shape).long()
    gains = advantages(given_rewards, lengths)
    assert gains.shape == given_rewards.shape and gains.isfinite().all()
    assert (gains.sum(1).abs() <= 1e-5 * (1 + gains.abs().sum(1))).all()
    assert zero_variance(given_rewards)[-1] and not gains[zero_variance(given_rewards)].any()
    torch.testing.assert_close(advantages(given_rewards.flip(1), lengths), gains.flip(1), rtol=1e-5, atol=1e-5)


@quick
@given(batches, st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
def test_what_is_masked_changes_nothing(b: dict[str, torch.Tensor], junk: float) -> None:
    spoilt = {k: v.masked_fill(~b["mask"], junk) if "logprobs" in k else v for k, v in b.items()}
    for loss in (policy, preference):
        (value, gradient), (after, gradient_after) = loss(b), loss(spoilt)
        assert torch.equal(value, after) and torch.equal(gradient, gradient_after)
        assert not gradient[~b["mask"]].any()


@quick
@given(batches)
def test_padding_columns_and_fully_masked_rows_change_nothing(b: dict[str, torch.Tensor]) -> None:
    wide = {k: torch.nn.functional.pad(v, (0, 3)) if v.dim() == 2 else v for k, v in b.items()}
    torch.testing.assert_close(policy(wide)[0], policy(b)[0], **CLOSE)
    torch.testing.assert_close(preference(wide)[0], preference(b)[0], **CLOSE)
    padded = {k: torch.cat([v, v[:2] if k != "mask" else torch.zeros_like(v[:2])]) for k, v in b.items()}
    torch.testing.assert_close(policy(padded)[0], policy(b)[0], **CLOSE)


@quick
@given(batches)
def test_losses_and_figures_of_parts_add_up(b: dict[str, torch.Tensor]) -> None:
    def figures(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss, statistics = policy_loss(**policy_arguments(part))
        _, pairs = dpo_loss(part["logprobs"], None, part["mask"], 1.0)
        return {"loss": loss, **statistics, **{f"pair {k}": v for k, v in pairs.items()}}

    total = figures(b)
    parts = [figures({k: v[at] for k, v in b.items()}) for at in (slice(0, 2), slice(2, None))]
    for name, figure in total.items():
        both = torch.stack([part[name] for part in parts])
        combined = both.max() if name.startswith("max_") else both.sum()
        torch.testing.assert_close(combined, figure, rtol=1e-5, atol=1e-5)


@quick
@given(batches)
def test_no_cap_and_an_honest_sampler_is_the_plain_surrogate(b: dict[str, torch.Tensor]) -> None:
    same = {**b, "sampler_logprobs": b["old_logprobs"]}
    capped, free = policy(same), policy(same, tis_cap=math.inf)
    assert torch.equal(capped[0], free[0]) and torch.equal(capped[1], free[1])
    plain = policy_loss(b["logprobs"], b["logprobs"], b["advantages"], b["mask"])
    assert plain[0].item() == pytest.approx(-(b["advantages"][:, None] * b["mask"]).sum().item(), rel=1e-5, abs=1e-5)
    assert plain[1]["clip_fraction"] == 0 and plain[1]["max_sampler_gap"] == 0


@quick
@given(batches)
def test_the_first_update_is_the_policy_gradient(b: dict[str, torch.Tensor]) -> None:
    """Ratio 1: the gradient is minus advantage times weight, whatever the clip."""
    gap = (b["logprobs"] - b["sampler_logprobs"]).exp().clamp(max=2.0)
    _, gradient = with_gradient(
        lambda lp: policy_loss(lp, b["sampler_logprobs"], b["advantages"], b["mask"])[0], b["logprobs"]
    )
    torch.testing.assert_close(gradient, -(b["advantages"][:, None] * gap * b["mask"]), **CLOSE)


@quick
@given(batches)
def test_advantages_by_token_agree_with_those_by_row(b: dict[str, torch.Tensor]) -> None:
    by_token = {**b, "advantages": b["advantages"][:, None].expand_as(b["mask"])}
    assert torch.equal(policy(by_token)[0], policy(b)[0])


def test_half_precision_is_summed_in_full() -> None:
    b = batch(16, 128)
    low = {k: v.bfloat16() if "logprobs" in k else v for k, v in b.items()}
    value, figures = policy_loss(**policy_arguments(low))
    assert value.dtype == torch.float32 and all(f.dtype == torch.float32 for f in figures.values())
    exact = {k: v.double() if v.dtype == torch.bfloat16 else v for k, v in low.items()}
    torch.testing.assert_close(value, policy_loss(**policy_arguments(exact))[0], **CLOSE)
