"""The losses: against TRL 1.16's own methods, by hand, and by their properties. Values and gradients to 1e-6."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.algorithms.losses import advantages, dpo_loss, policy_loss, zero_variance
from stages.rl.algorithms.policy_losses import registry as policy_losses

pytestmark = pytest.mark.numeric

SHAPES = [(1, 1), (2, 3), (4, 7), (8, 33), (16, 128)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums of float32 in another order differ by some 5e-7
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def batch(rows: int, width: int, seed: int = 0, apart: float = 0.5) -> dict[str, torch.Tensor]:
    """Log-probabilities of a policy and its near relations, with a ragged mask whose rows each hold a token."""
    make = torch.Generator().manual_seed(seed)

    def near(base: torch.Tensor) -> torch.Tensor:
        return (base + apart * torch.randn(rows, width, generator=make)).clamp(max=-1e-3)

    logprobs = near(torch.full((rows, width), -1.5))
    lengths = torch.randint(1, width + 1, (rows,), generator=make)
    return {
        "logprobs": logprobs,
        "old_logprobs": near(logprobs),
        "sampler_logprobs": near(logprobs),
        "reference_logprobs": near(logprobs),
        "advantages": torch.randn(rows, generator=make),
        "mask": torch.arange(width)[None] < lengths[:, None],
    }


def with_gradient(loss: Any, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logprobs.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def trl_fragment(method: Any, first: str, last: str, **names: Any) -> dict[str, Any]:
    """Runs a part of one of TRL's long methods, from the line that holds `first` up to the one that holds `last`."""
    lines = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    scope = {**vars(inspect.getmodule(method)), **names}
    exec(textwrap.dedent("\n".join(lines[start:end])), scope)  # noqa: S102
    return scope


# --- GRPO against TRL -----------------------------------------------------------------------------------------------


def trl_grpo(
    b: dict[str, torch.Tensor], cap: float, low: float, high: float, first_update: bool, kind: str = "dapo"
) -> Any:
    """A function of log-probabilities that is TRL's loss times its number of tokens; and the metrics that it logs."""
    from trl import GRPOTrainer

    old = b["logprobs"] if first_update else b["old_logprobs"]
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        loss_type=kind,
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=cap,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    scope = trl_fragment(
        GRPOTrainer._generate_and_score_completions,
        "# Compute the importance sampling ratio when using vLLM",
        "# Compute the per-token log probabilities for the reference model",
        self=trainer,
        completion_mask=b["mask"].int(),
        tool_mask=None,
        old_per_token_logps=old,
        sampling_per_token_logps=b["sampler_logprobs"],
    )
    rows, width = b["mask"].shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long),
        "completion_mask": b["mask"].int(),
        "advantages": b["advantages"],
        "old_per_token_logps": None if first_update else old,
        "importance_sampling_ratio": scope["vllm_importance_sampling_ratio"],
        "num_items_in_batch": b["mask"].sum(),
    }

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros(rows, width), None)
        return GRPOTrainer._compute_loss(trainer, None, inputs) * b["mask"].sum()

    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first_update", [True, False])
def test_cispo_is_trls(shape: tuple[int, int], first_update: bool) -> None:
    b = batch(*shape, seed=sum(shape))
    theirs, metrics = trl_grpo(b, 2.0, 0.2, 1.4, first_update, "cispo")  # TRL's upper clip is the bound itself
    figures: dict[str, torch.Tensor] = {}

    def ours(logprobs: torch.Tensor) -> torch.Tensor:
        loss, statistics = policy_loss(
            logprobs, b["sampler_logprobs"], b["advantages"], b["mask"], token_loss=policy_losses.load("cispo"),
            clip_high=0.4, old_logprobs=None if first_update else b["old_logprobs"],
        )  # fmt: skip
        figures.update(statistics)
        return loss

    for mine, other in zip(with_gradient(ours, b["logprobs"]), with_gradient(theirs, b["logprobs"]), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    share = figures["clip_fraction"].item() / figures["tokens"].item()
    assert share == pytest.approx(metrics["cispo_clip_ratio"][-1], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first_update", [True, False])
@pytest.mark.parametrize(("cap", "low", "high"), [(2.0, 0.2, 0.28), (1.1, 0.05, 0.4)])
def test_policy_loss_is_trls(shape: tuple[int, int], first_update: bool, cap: float, low: float, high: float) -> None:
    b = batch(*shape, seed=sum(shape))
    theirs, metrics = trl_grpo(b, cap, low, high, first_update)
    figures: dict[str, torch.Tensor] = {}

    def ours(logprobs: torch.Tensor) -> torch.Tensor:
        loss, statistics = policy_loss(
            logprobs,
            b["sampler_logprobs"],
            b["advantages"],
            b["mask"],
            clip_low=low,
            clip_high=high,
            tis_cap=cap,
            old_logprobs=None if first_update else b["old_logprobs"],
        )
        figures.update(statistics)
        return loss

    (value, gradient), (expected, expected_gradient) = (
        with_gradient(ours, b["logprobs"]),
        with_gradient(theirs, b["logprobs"]),
    )
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE)
    tokens = figures["tokens"].item()
    assert tokens == b["mask"].sum()
    assert figures["clip_fraction"].item() / tokens == pytest.approx(metrics["clip_ratio/region_mean"][-1], abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (8, 16)])
def test_advantages_are_trls(shape: tuple[int, int]) -> None:
    from trl import GRPOTrainer

    rewards = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    rewards[0] = 0.1  # no signal, and a mean in fp32 that is not exactly it
    scope = trl_fragment(
        GRPOTrainer._generate_and_score_completions,
        "unscorable_mask = torch.isnan(rewards_per_func)",
        "# Slice to keep only the local part of the data",
        self=SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards="none", reward_weights=torch.ones(1)
        ),
        rewards_per_func=rewards.reshape(-1, 1),
        num_generations=shape[1],
        device="cpu",
    )
    torch.testing.assert_close(advantages(rewards), scope["advantages"].view(shape), **CLOSE)
    assert zero_variance(rewards).tolist() == scope["is_std_zero"].view(shape)[:, 0].tolist()
    assert advantages(rewards)[0].tolist() == [0.0] * shape[1]


# --- DPO against TRL ------------------------------------------------------------------------------------------------


def interleaved(halves: torch.Tensor) -> torch.Tensor:
    """TRL stacks the chosen rows on the rejected ones; ours alternate."""
    return halves.view(2, -1, *halves.shape[1:]).transpose(0, 1).reshape(halves.shape)


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (6, 9), (16, 64)])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_dpo_loss_is_trls(shape: tuple[int, int], beta: float) -> None:
    from trl import DPOTrainer

    b, (rows, width) = batch(*shape, seed=sum(shape)), shape
    b = {name: tensor * b["mask"] if "logprobs" in name else tensor for name, tensor in b.items()}

    def outputs(logprobs: torch.Tensor) -> SimpleNamespace:
        nothing = torch.zeros(rows, width)
        return SimpleNamespace(
            log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), aux_loss=None
        )

    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=lambda **_: outputs(b["reference_logprobs"]),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid_norm"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros(rows, width + 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, width + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(b["mask"].long(), (1, 0)),
    }

    def theirs(logprobs: torch.Tensor) -> torch.Tensor:
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs(logprobs), inputs, False) * (rows // 2)

    figures: dict[str, torch.Tensor] = {}

    def ours(logprobs: torch.Tensor) -> torch.Tensor:
        loss, statistics = dpo_loss(
            interleaved(logprobs), interleaved(b["reference_logprobs"]), interleaved(b["mask"]), beta
        )
        figures.update(statistics)
        return loss

    (value, gradient), (expected, expected_gradient) = (
        with_gradient(ours, b["logprobs"]),
        with_gradient(theirs, b["logprobs"]),
    )
    torch.testing.assert_close(value, expected, **CLOSE)
    # TRL's mask stands in its model's log-probabilities, which are constants here where they are masked.
    torch.testing.assert_close(gradient * b["mask"], expected_gradient * b["mask"], **CLOSE)
    assert not (gradient * ~b["mask"]).any()
    assert figures["pairs"].item() == rows / 2


@pytest.mark.parametrize("pairs", [1, 3, 32])
def test_without_a_reference_it_is_the_reward_models_loss(pairs: int) -> None:
    from trl import RewardTrainer

    scores = torch.randn(2 * pairs, 1, generator=torch.Generator().manual_seed(pairs))
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), {}) * pairs

    figures: dict[str, torch.Tensor] = {}

    def ours(scores: torch.Tensor) -> torch.Tensor:
        loss, statistics = dpo_loss(interleaved(scores), None, torch.ones(2 * pairs, 1), 1.0)
        figures.update(statistics)
        return loss

    (value, gradient), (expected, expected_gradient) = with_gradient(ours, scores), with_gradient(theirs, scores)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE)
    metrics = trainer._metrics["eval"]
    assert figures["accuracy"].item() / pairs == pytest.approx(metrics["accuracy"][-1])
    assert figures["margin"].item() / pairs == pytest.approx(metrics["margin"][-1], abs=1e-6)


@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_without_a_reference_it_is_simpo_without_a_margin(beta: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    b = batch(8, 9)
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, alpha=0.0, loss_type="simpo", simpo_gamma=0.0, beta=beta, label_smoothing=0.0
    )

    def theirs(logprobs: torch.Tensor) -> torch.Tensor:
        mean = (logprobs * b["mask"]).sum(1) / b["mask"].sum(1)
        return CPOTrainer.cpo_loss(trainer, mean[0::2], mean[1::2])[0].sum()

    def ours(logprobs: torch.Tensor) -> torch.Tensor:
        return dpo_loss(logprobs, None, b["mask"], beta)[0]

    for value, expected in zip(with_gradient(ours, b["logprobs"]), with_gradient(theirs, b["logprobs"]), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


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
    assert figures["ratio"].item() == pytest.approx(ratio, rel=1e-6)


def test_the_samplers_weight_by_hand() -> None:
    """Weights 0.5, 1 and (3, held at the cap of) 2, on tokens whose ratio is 1 and advantage 1."""
    logprobs, weights = torch.full((1, 3), -2.0), torch.tensor([[0.5, 1.0, 3.0]])
    value, figures = policy_loss(logprobs, logprobs - weights.log(), torch.ones(1), torch.ones(1, 3))
    assert value.item() == pytest.approx(-3.5, rel=1e-6)
    assert figures["importance_ratio"].item() == pytest.approx(3.5, rel=1e-6) and figures["truncated"].item() == 1
    assert figures["max_sampler_gap"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert figures["sampler_gap"].item() == pytest.approx(math.log(3) + math.log(2), rel=1e-6)
    kl = sum(w - 1 - math.log(w) for w in (0.5, 1, 3))
    assert figures["sampler_kl"].item() == pytest.approx(kl, rel=1e-5)


def test_a_pair_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -3.0], [-4.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, figures = dpo_loss(logprobs, torch.tensor([[-2.0, -4.0], [-3.0, 0.0]]), mask, 0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))  # scores 1 and -1: beta times the difference is 1
    assert {name: figure.item() for name, figure in figures.items()} == pytest.approx(
        {"pairs": 1, "accuracy": 1, "margin": 1, "chosen": 0.5, "rejected": -0.5}
    )


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


@quick
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_sum_to_nothing_and_equal_rewards_give_exactly_none(rewards: list[list[float]]) -> None:
    given_rewards = torch.tensor(rewards)
    gains = advantages(given_rewards)
    assert gains.shape == given_rewards.shape
    assert (gains.sum(1).abs() <= 1e-5 * (1 + given_rewards.abs().sum(1))).all()
    assert not gains[zero_variance(given_rewards)].any()
    torch.testing.assert_close(advantages(given_rewards.flip(1)), gains.flip(1), rtol=1e-5, atol=1e-3)


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
