"""How answers end: what counts as a loop, what becomes of an answer that is cut off, and what the card says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from release.cards import tables
from release.facts import training
from stages.rl.algorithms.grpo import mark_dropped
from stages.rl.rollout.rollouts import Rollout, loops, termination_metrics


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([], False),
        ([5], False),
        ([9, 9, 9, 9, 9], False),  # an n-gram has two tokens: this has two copies and a half of one
        ([9] * 6, True),
        ([8, 9] * 3, True),
        ([1, 8, 9, 8, 9, 8, 9], True),
        ([9, 8, 9, 8, 9], False),
        ([8, 9, 8, 9, 8, 9, 1], False),  # it went on with something else
        ([8, 9, 9] * 3, True),
        ([8, 9, 9, 8, 9, 9, 7, 9, 9], False),
        ([*range(100), *range(40)] * 3, True),
        ([*range(1000)], False),
    ],
)
def test_a_loop_ends_with_three_copies_of_an_n_gram(ids: list[int], loop: bool) -> None:
    assert loops(ids) is loop


ROLLOUT = Rollout(
    step=1, wave=0, group=0, sample=0, task="t", kind="k", level=0, policy="p", seed=0, prompt_ids=[1], ids=[7] * 6,
    logprobs=[-1.0] * 6, text="", finished=True, reward=0.0, parts={}, verifier="v", verifier_version="1", dropped="",
)  # fmt: skip


def test_only_answers_that_are_cut_off_loop() -> None:
    answers = [ROLLOUT, replace(ROLLOUT, finished=False), replace(ROLLOUT, finished=False, ids=[1, 2, 3]), ROLLOUT]
    assert termination_metrics(answers) == {"truncated": 0.5, "looping": 0.25}


def test_answers_that_are_cut_off_are_masked_or_scored() -> None:
    answers = [replace(ROLLOUT, reward=1.0), replace(ROLLOUT, finished=False)]
    assert [r.dropped for r in mark_dropped(answers, 2)[0]] == ["", "truncated"]
    assert [r.dropped for r in mark_dropped(answers, 2, keep_truncated=True)[0]] == ["", ""]


def test_the_card_has_shares_and_alarms() -> None:
    lines = [{"step": n, "tokens": n, "truncated": n / 10, "looping": 0.0} for n in range(1, 9)]
    lines[7]["alarms"] = {"truncated": 0.75}
    facts = training.log_facts(lines)
    model = SimpleNamespace(training={"sft": training.log_facts([{"step": 1, "tokens": 1}]), "rlvr": facts})
    *_, cut, loop, _, alarm = tables.termination(model)  # type: ignore[arg-type]
    assert cut.endswith("| cut off by the length limit | 15.0% | 75.0% | 80.0% (step 8) |")
    assert loop.endswith("| cut off in a loop | 0.0% | 0.0% | 0.0% (step 1) |")
    assert "more than 75.0% of the answers were cut off by the length limit in 1 of the steps" in alarm
    assert tables.termination(SimpleNamespace(training={"sft": facts and model.training["sft"]})) == []  # type: ignore[arg-type]
