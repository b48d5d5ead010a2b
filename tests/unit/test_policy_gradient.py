"""Each algorithm by name against its paper's equation, written plainly here: from rewards of groups with answers of
unequal length to the value of the loss and its gradient. And its settings: what has no effect is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.stage import identity
from stages.rl.algorithms import policy_gradient
from stages.rl.algorithms.grpo import mark_dropped, objective, training_groups
from stages.rl.config import RlTrainConfig
from stages.rl.rollout.batches import build_rank_batch
from stages.rl.rollout.rollouts import Rollout
from tests.fixtures import ROOT, rl_fixtures

MAX_LENGTH = rl_fixtures.PHASE["sampling"]["max_new_tokens"]
ONE_RANK: Any = SimpleNamespace(data_ranks=1, data_rank=0, layout=SimpleNamespace(pp=1, width_unit=1))
Group = Sequence[float]
Numbers = Sequence[Any]
"""A number per token: tensors without dimensions."""

# --- the papers' equations ------------------------------------------------------------------------------------------


def centered(groups: Sequence[Group]) -> list[list[float]]:
    return [[r - fmean(group) for r in group] for group in groups]


def standardized(groups: Sequence[Group]) -> list[list[float]]:
    return [[(r - fmean(group)) / (stdev(group) + 1e-4) for r in group] for group in groups]


def ppo(ratio: Any, gain: float, low: float, high: float) -> Any:
    return -min(ratio * gain, min(max(ratio, 1 - low), 1 + high) * gain)


def by_token(low: float, high: float) -> Callable[..., list[Any]]:
    def losses(new: Numbers, old: Numbers, gain: float) -> list[Any]:
        return [ppo((n - o).exp(), gain, low, high) for n, o in zip(new, old, strict=True)]

    return losses


def by_answer(low: float, high: float) -> Callable[..., list[Any]]:
    def losses(new: Numbers, old: Numbers, gain: float) -> list[Any]:
        ratio = (sum(n - o for n, o in zip(new, old, strict=True)) / len(new)).exp()
        return [ppo(ratio, gain, low, high)] * len(new)

    return losses


def cispo(new: Numbers, old: Numbers, gain: float) -> list[Any]:
    return [-min((n - o).exp().item(), 1 + 4.0) * gain * n for n, o in zip(new, old, strict=True)]


def mean_of_tokens(answers: Sequence[Numbers]) -> Any:
    tokens = [loss for answer in answers for loss in answer]
    return sum(tokens) / len(tokens)


def mean_of_answers(answers: Sequence[Numbers]) -> Any:
    return sum(sum(answer) / len(answer) for answer in answers) / len(answers)


def by_constant(answers: Sequence[Numbers]) -> Any:
    return sum(sum(answer) / MAX_LENGTH for answer in answers) / len(answers)


PAPERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "dapo-centered": (centered, by_token(0.2, 0.28), mean_of_tokens),
    "dapo": (standardized, by_token(0.2, 0.28), mean_of_tokens),
    "grpo": (standardized, by_token(0.2, 0.2), mean_of_answers),
    "dr-grpo": (centered, by_token(0.2, 0.2), by_constant),
    "gspo": (standardized, by_answer(3e-4, 4e-4), mean_of_answers),
    "cispo": (standardized, cispo, mean_of_tokens),
}
"""{algorithm: (advantages of groups of rewards, losses of an answer's tokens, their mean)}"""


def test_every_algorithm_is_described_for_users() -> None:
    page = (ROOT / "docs/post-training.md").read_text()
    section = page.partition("\n### Algorithms\n")[2].partition("\n### ")[0]
    missing = [name for name in policy_gradient.ALGORITHMS if f"`{name}`" not in section]
    assert not missing, f"docs/post-training.md, section Algorithms, does not describe {', '.join(missing)}"


def test_every_algorithm_has_an_equation_here() -> None:
    assert set(PAPERS) == set(policy_gradient.ALGORITHMS)


# --- the same through the code that a step runs -----------------------------------------------------------------------


def draw(groups: Sequence[Group], seed: int) -> list[Rollout]:
    """Answers of 1 to 9 tokens, the second of the first group cut off. The first token names the answer."""
    make = torch.Generator().manual_seed(seed)
    answers = []
    for number, reward in enumerate(r for group in groups for r in group):
        length = int(torch.randint(1, 10, (), generator=make))
        logprobs = (-2 * torch.rand(length, generator=make)).tolist()
        answers.append(
            Rollout(
                step=1, wave=0, group=0, sample=0, task="t", kind="k", level=0, policy="p", seed=0,
                prompt_ids=[number, *[7] * (number % 3)], ids=[7] * length, logprobs=logprobs, text="",
                finished=number != 1, reward=reward, parts={}, verifier="v", verifier_version="1", dropped="",
            )
        )  # fmt: skip
    return mark_dropped(answers, len(groups[0]))[0]


SHAPES = {
    "pairs": [[1.0, 0.0], [0.25, 0.75]],
    "equal groups among others": [[1.0, 1.0, 0.0], [0.1, 0.1, 0.1], [0.0, 0.5, 2.0], [1.0, 1.0, 1.0]],
    "one group": [[3.0, -1.0, 0.5, 0.5, 0.25]],
}


@pytest.mark.numeric
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kl", [None, 0.3])
@pytest.mark.parametrize("first_update", [True, False])
@pytest.mark.parametrize("name", PAPERS)
def test_an_algorithm_is_its_papers(name: str, first_update: bool, kl: float | None, shape: str) -> None:
    updates = 1 if first_update else 2
    config = rl_fixtures.config(algorithm=name, kl_coef=kl, updates=updates)
    phase, algorithm = RlTrainConfig.model_validate(config).phase, policy_gradient.load(name)
    answers = draw(SHAPES[shape], seed=len(shape))
    examples = [x for group in training_groups(answers, algorithm) for x in group]
    units = [[x] for x in sorted(examples, key=lambda x: len(x.ids))]
    divisor = algorithm.mean.divisor([len(x.ids) - x.start for x in examples], MAX_LENGTH)
    batch = build_rank_batch(units, 2, ONE_RANK, 0, divisor)
    make = torch.Generator().manual_seed(7)
    minimize, value, leaves = objective(phase), torch.zeros(()), []
    tokens: dict[int, dict[str, Any]] = {}
    for micro in batch.micro:
        # the policy has moved since the first update; its log-probabilities under the mask are the sampler's then
        before = micro.extras["sampler"]
        leaf = (before if first_update else before + 0.3 * torch.randn(before.shape, generator=make)).clone()
        leaf[~micro.loss_mask.bool()] = math.nan
        reference = before + 0.5 * torch.randn(before.shape, generator=make)
        leaves.append(leaf.requires_grad_())
        extras = {
            **micro.extras,
            **({} if first_update else {"old": before}),
            **({"reference": reference} if kl else {}),
        }
        value = value + minimize(-leaf, SimpleNamespace(extras=extras, loss_mask=micro.loss_mask))[0]  # type: ignore[arg-type]
        for row, mask in enumerate(micro.loss_mask.bool()):
            places = mask.nonzero().flatten().tolist()
            new = [torch.tensor(leaf[row, i].item(), dtype=torch.float64, requires_grad=True) for i in places]
            first_input = int(micro.targets[0, micro.targets[1] == row * mask.numel()])
            tokens[int(micro.ids[0, micro.starts[0, first_input]])] = {
                "new": new, "old": before[row, mask].double(), "reference": reference[row, mask].double(),
                "gradient": (len(leaves) - 1, row, mask),
            }  # fmt: skip
    (value / divisor).backward()

    advantages, losses, mean = PAPERS[name]
    kept = [group for group in SHAPES[shape] if len(set(group)) > 1]
    gains = [gain for group in advantages(kept) for gain in group]
    learnt = [number for number, r in enumerate(answers) if r.dropped != "variance"]
    of_answers, places = [], []
    for number, gain in zip(learnt, gains, strict=True):
        if answers[number].finished:
            t = tokens[number]
            of_tokens = losses(t["new"], t["old"], gain)
            if kl:
                apart = [reference - n for reference, n in zip(t["reference"], t["new"], strict=True)]
                of_tokens = [loss + kl * (d.exp() - d - 1) for loss, d in zip(of_tokens, apart, strict=True)]
            of_answers.append(of_tokens)
            places.append(t)
    expected = mean(of_answers)
    expected.backward()
    assert sorted(tokens) == [number for number in learnt if answers[number].finished]
    torch.testing.assert_close(value.double() / divisor, expected, rtol=1e-5, atol=1e-6)
    for t in places:
        leaf, row, mask = t["gradient"]
        gradient = leaves[leaf].grad
        assert gradient is not None and not gradient[row][~mask].any()
        expected_gradient = [0.0 if n.grad is None else n.grad.item() for n in t["new"]]
        torch.testing.assert_close(gradient[row][mask].tolist(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_advantages_get_the_lengths_of_answers() -> None:
    """So that an algorithm can weigh answers by them. A truncated answer counts, and has no row."""
    answers = draw([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], 0)
    lengths_of = []

    def advantages(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        lengths_of.append(lengths.tolist())
        return lengths.float()

    algorithm = replace(policy_gradient.GRPO, advantages=advantages)
    groups = training_groups(answers, algorithm)
    assert lengths_of == [[[len(r.ids) for r in answers[:3]], [len(r.ids) for r in answers[3:]]]]
    examples = [example for group in groups for example in group]
    assert [example.row["advantage"] for example in examples] == [len(r.ids) for r in answers if r.finished]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy_gradient.ALGORITHMS)
def test_the_clip_is_the_algorithms_unless_the_recipe_has_one(name: str) -> None:
    algorithm = policy_gradient.load(name)
    phase = RlTrainConfig.model_validate(rl_fixtures.config(algorithm=name)).phase
    assert (phase.clip_low, phase.clip_high) == (algorithm.clip_low, algorithm.clip_high)
    again = RlTrainConfig.model_validate(rl_fixtures.config(**phase.model_dump(mode="json"))).phase
    assert again == phase, "a written recipe is read as the same"
    if algorithm.clip_high is not None:
        wider = RlTrainConfig.model_validate(rl_fixtures.config(algorithm=name, updates=2, clip_high=0.5)).phase
        assert (wider.clip_low, wider.clip_high) == (algorithm.clip_low, 0.5)


def test_settings_that_were_added_are_in_no_key_by_default() -> None:
    phase = identity(RlTrainConfig.model_validate(rl_fixtures.config()).phase)
    assert not {"algorithm", "loss_type", "updates", "kl_coef"} & set(phase)
    assert (phase["clip_low"], phase["clip_high"], phase["tis_cap"]) == (0.2, 0.28, 2.0)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"clip_high": 0.3}, "clip_high = 0.3 has no effect with updates = 1"),
        ({"algorithm": "grpo", "clip_low": 0.1}, "clip_low = 0.1 has no effect with updates = 1"),
        ({"algorithm": "cispo", "updates": 2, "clip_low": 0.1}, "algorithm cispo has no such clip; leave it out"),
        ({"updates": 5}, "updates = 5 is more than prompts_per_step = 4"),
        (
            {"updates": 3, "replay": {"mix": {"a": 1.0}, "rows": 2, "sequence_length": 8, "weight": 1.0}},
            "updates = 3 is more than replay.rows = 2",
        ),
        (
            {"sampling": {"max_new_tokens": 12, "url": ["http://node1:8000"]}},
            "url has no effect with kind = in-process",
        ),
        ({"algorithm": "ppo"}, "'dapo-centered', 'dapo', 'grpo'"),
        ({"algorithm": ["grpo"]}, "'dapo-centered', 'dapo', 'grpo'"),
    ],
)
def test_settings_without_an_effect_are_refused(phase: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RlTrainConfig.model_validate(rl_fixtures.config(**phase))
    (error,) = refused.value.errors()
    assert words in error["msg"]
