"""The losses against TRL 1.16's own methods: values and gradients to 1e-6."""

from __future__ import annotations

import inspect
import textwrap
from collections import defaultdict
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.rl.algorithms import policy_gradient
from stages.rl.algorithms.losses import dpo_loss, policy_loss
from stages.rl.algorithms.policy_gradient import zero_variance
from tests.fixtures.loss_fixtures import CLOSE, batch, with_gradient

pytestmark = pytest.mark.numeric

SHAPES = [(1, 1), (2, 3), (4, 7), (8, 33), (16, 128)]
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


source = cache(inspect.getsource)


def trl_fragment(method: Any, first: str, last: str, **names: Any) -> dict[str, Any]:
    """Runs a part of one of TRL's long methods, from the line that holds `first` up to the one that holds `last`."""
    lines = source(method).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    scope = {**vars(inspect.getmodule(method)), **names}
    exec(textwrap.dedent("\n".join(lines[start:end])), scope)  # noqa: S102
    return scope


# --- policy gradients against TRL -----------------------------------------------------------------------------------

MAX_LENGTH = 200
TRL = {
    "dapo-centered": ("dapo", "token", "none"),
    "dapo": ("dapo", "token", "group"),
    "grpo": ("grpo", "token", "group"),
    "dr-grpo": ("dr_grpo", "token", "none"),
    "gspo": ("grpo", "sequence", "group"),
    "cispo": ("cispo", "token", "group"),
}
"""{algorithm: TRL's loss_type, importance_sampling_level and scale_rewards}"""


def trl_grpo(
    b: dict[str, torch.Tensor], name: str, cap: float, low: float, high: float, first_update: bool, beta: float
) -> Any:
    """TRL's loss as a function of log-probabilities; and the metrics that it logs."""
    from trl import GRPOTrainer

    kind, level, _ = TRL[name]
    old = b["logprobs"] if first_update else b["old_logprobs"]
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        loss_type=kind,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=1 + high if kind == "cispo" else high,  # there TRL's is the bound itself
        max_completion_length=MAX_LENGTH,
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
    inputs = {
        **without_tokens(b),
        "old_per_token_logps": None if first_update else old,
        "ref_per_token_logps": b["reference_logprobs"],
        "importance_sampling_ratio": scope["vllm_importance_sampling_ratio"],
        "num_items_in_batch": b["mask"].sum(),
    }

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss, trainer._metrics["train"]


def without_tokens(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What TRL's trainers of groups are given, beside log-probabilities."""
    rows, width = b["mask"].shape
    return {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long),
        "completion_mask": b["mask"].int(),
        "advantages": b["advantages"],
    }


def our_loss(b: dict[str, torch.Tensor], name: str, figures: dict[str, torch.Tensor], **settings: Any) -> Any:
    """Ours as a function of log-probabilities: the sum by the algorithm's weights and divisor."""
    algorithm, lengths = policy_gradient.load(name), b["mask"].sum(1).tolist()

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        value, statistics = policy_loss(
            logprobs, b["sampler_logprobs"], b["advantages"], b["mask"], token_loss=algorithm.token_loss,
            row_weights=torch.tensor([algorithm.mean.weight(length) for length in lengths]), **settings,
        )  # fmt: skip
        figures.update(statistics)
        return value / algorithm.mean.divisor(lengths, MAX_LENGTH)

    return loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first_update", [True, False])
@pytest.mark.parametrize(("beta", "cap"), [(0.0, 2.0), (0.3, 1.1)])
@pytest.mark.parametrize("name", TRL)
def test_the_loss_of_an_algorithm_is_trls(
    name: str, shape: tuple[int, int], first_update: bool, beta: float, cap: float
) -> None:
    b, algorithm = batch(*shape, seed=sum(shape)), policy_gradient.load(name)
    for low, high in [(algorithm.clip_low or 0.2, algorithm.clip_high), (0.05, 0.4)]:
        assert high is not None
        theirs, metrics = trl_grpo(b, name, cap, low, high, first_update, beta)
        figures: dict[str, torch.Tensor] = {}
        ours = our_loss(
            b, name, figures, clip_low=low, clip_high=high, tis_cap=cap,
            old_logprobs=None if first_update else b["old_logprobs"],
            **({"reference_logprobs": b["reference_logprobs"], "kl_coef": beta} if beta else {}),
        )  # fmt: skip
        for mine, other in zip(with_gradient(ours, b["logprobs"]), with_gradient(theirs, b["logprobs"]), strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)
        tokens = figures["tokens"].item()
        assert tokens == b["mask"].sum()
        if beta:
            assert figures["kl"].item() / tokens == pytest.approx(metrics["kl"][-1], rel=1e-5)
        if name != "gspo":  # TRL counts answers there, and this project tokens
            clipped = metrics["cispo_clip_ratio" if name == "cispo" else "clip_ratio/region_mean"][-1]
            assert figures["clip_fraction"].item() / tokens == pytest.approx(clipped, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (8, 16)])
@pytest.mark.parametrize("name", TRL)
def test_advantages_are_trls(name: str, shape: tuple[int, int]) -> None:
    from trl import GRPOTrainer

    rewards = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if shape[0] > 1:
        rewards[0] = 0.5  # no signal
    scope = trl_fragment(
        GRPOTrainer._generate_and_score_completions,
        "unscorable_mask = torch.isnan(rewards_per_func)",
        "# Slice to keep only the local part of the data",
        self=SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=TRL[name][2], reward_weights=torch.ones(1)
        ),
        rewards_per_func=rewards.reshape(-1, 1),
        num_generations=shape[1],
        device="cpu",
    )
    advantages = policy_gradient.load(name).advantages
    torch.testing.assert_close(advantages(rewards, torch.ones(shape).long()), scope["advantages"].view(shape), **CLOSE)
    assert zero_variance(rewards).tolist() == scope["is_std_zero"].view(shape)[:, 0].tolist()


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

    model = torch.nn.Module()  # TRL asks PEFT what it is
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        model=model,
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
