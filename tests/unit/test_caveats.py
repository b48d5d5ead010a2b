"""What a card says before its figures: every sentence by rule, from figures with their standard errors, and none else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from release.cards import caveats, chat_tables
from release.facts import training
from release.facts.model_facts import ModelFacts, Parameters


def value(x: float, se: float = 0.01, n: int = 400) -> dict[str, Any]:
    return {"value": x, "se": se, "n": n}


def problems(accuracy: float, judged: float, tokens: float = 20.0) -> dict[str, Any]:
    entry = {"samples": {"accuracy": value(accuracy), "tokens": tokens}}
    row = {"reward": value(judged), "tokens": tokens}
    return {"problems": {"add": entry}, "problems_all": entry, "judged": {"courtesy": row}}


def compared(before: str, sides: dict[str, Any], win: float = 0.5) -> dict[str, Any]:
    rate = value(win, 0.02) | {"low": win - 0.04, "high": win + 0.04}
    return {"before": before, "sides": sides, "win_rate": rate, "wins": 4, "ties": 5, "losses": 6}


def side(reward: float, task: float | None, ending: float, **others: float) -> dict[str, Any]:
    parts = {"ending": ending, "reward": reward, **({} if task is None else {"task": task}), **others}
    return {"parts": {name: value(x) for name, x in parts.items()}}


def log(*rewards: float, kind: str = "add") -> training.PhaseLog:
    return training.log_facts([{"step": n, "tokens": n, "rewards": {kind: x}} for n, x in enumerate(rewards, 1)])


def facts(**changes: Any) -> ModelFacts:
    """A release in which nothing gets worse and every reward that rises has its task rise."""
    bits = {"init": 8.0, "base": 2.0, "mid": 1.9, "sft": 1.8, "rlvr": 1.8, "dpo": 1.8}
    scores = {
        name: {"bits_per_byte": {"sums": value(x)}, "accuracy": {"add": value(n / 10)}}
        for n, (name, x) in enumerate(bits.items())
    }
    sides = {"before": side(0.3, 0.3, 0.3), "model": side(0.6, 0.6, 0.5)}
    model = ModelFacts(
        "Qwen3MoeForCausalLM", {}, "bfloat16", Parameters(1, 1, 1), scores,
        chat={
            "test": {"sft": problems(0.4, 0.3), "rlvr": problems(0.8, 0.3), "dpo": problems(0.8, 0.6)},
            "preferences": {"dpo": compared("rlvr", sides)},
        },
        training={"rlvr": log(0.3, 0.31, 0.5, 0.79, 0.8), "dpo": log(0.3, 0.31, 0.5, 0.6, 0.59, kind="courtesy")},
    )  # fmt: skip
    return replace(model, **changes)


def caveat_lines(model: ModelFacts, part: str) -> list[str]:
    return [line for line in caveats.caveat_sentences(model) if part in line]


def test_where_all_is_well_only_the_share_that_does_what_was_asked_is_stated() -> None:
    assert caveats.caveat_sentences(facts()) == [
        "- This model does all that is asked in 0.600 ± 0.010 of 400 held-out requests. A win in the comparison of answers "
        "does not mean that it does more of them."
    ]
    assert caveats.caveat_sentences(facts(chat={}, training={})) == [caveats.NONE]


@pytest.mark.parametrize(("task", "expected"), [(0.002, True), (0.02, True), (0.05, False)])
def test_a_judge_that_is_pleased_by_style_alone_is_named(task: float, expected: bool) -> None:
    model = facts()
    model.chat["preferences"]["dpo"]["sides"] = {
        "before": side(0.26, 0.002, 0.32),
        "model": side(0.43, task, 0.95),
    }
    lines = caveat_lines(model, "A reward rose and its task did not**: from RLVR to DPO")
    assert bool(lines) == expected
    if lines:
        assert (
            "rose (0.260 ± 0.010 → 0.430 ± 0.010)" in lines[0]
            and "What rose: ending (0.320 ± 0.010 → 0.950" in lines[0]
        )


def test_a_phase_whose_training_reward_rises_alone_is_named() -> None:
    model = facts()
    model.chat["test"]["rlvr"] = problems(0.41, 0.3)
    (line,) = caveat_lines(model, "during RLVR")
    assert "for add rose (0.305 ± 0.005 → 0.795 ± 0.005" in line and "(0.400 ± 0.010 → 0.410 ± 0.010)" in line
    model = facts()
    model.chat["preferences"]["dpo"]["sides"]["model"] = side(0.3, 0.3, 0.3)
    assert len(caveat_lines(model, "during DPO, its reward for courtesy rose")) == 1
    model.training["dpo"] = log(0.3, 0.6, 0.3, 0.6, 0.3, kind="courtesy")
    assert not caveat_lines(model, "during DPO"), "within its standard errors nothing rose"
    model.training["dpo"] = log(0.1, 0.1, 0.5, 0.5, kind="code")
    assert len(caveat_lines(model, "and no task was measured**: during DPO, its reward for code rose")) == 1


def test_what_got_worse_is_listed() -> None:
    model = facts()
    model.scores["sft"]["bits_per_byte"]["sums"] = value(9.1, 0.3)
    model.scores["sft"]["accuracy"]["add"] = value(0.1)
    (line,) = caveat_lines(model, "got worse")
    assert line == (
        "- From mid-training to SFT these got worse: bits per byte of sums (1.900 ± 0.010 → 9.100 ± 0.300), "
        "exact match of add (0.200 ± 0.010 → 0.100 ± 0.010)."
    )
    model.scores["sft"]["bits_per_byte"]["sums"] = value(1.91, 0.3)
    assert "bits per byte" not in caveat_lines(model, "got worse")[0], "less than a standard error"


def test_a_reward_without_a_task_is_named_where_it_was_trained_on() -> None:
    model = facts()
    model.chat["preferences"]["dpo"]["sides"] = {"before": side(0.2, None, 0.3), "model": side(0.5, None, 0.9)}
    (line,) = caveats.caveat_sentences(model)
    assert "no task was measured**: during DPO, its reward for courtesy rose" in line
    assert caveats.caveat_sentences(replace(model, training={})) == [caveats.NONE], "no part fell"


@pytest.mark.parametrize(("won", "expected"), [(0.5, 0), (0.54, 0), (0.545, 1)])
def test_a_win_rate_beside_a_part_that_falls_is_named(won: float, expected: int) -> None:
    """Also without a rise of the mean reward, and against a model that is not the one before."""
    model = facts()
    sides = {"before": side(0.3, 0.3, 0.9, thing=0.8), "model": side(0.3, 0.35, 0.9, thing=0.6)}
    model.chat["preferences"]["online"] = compared("rlvr", sides, won)
    lines = caveat_lines(model, "**A reward rose and a part of it fell**: from RLVR to online")
    assert len(lines) == expected
    if lines:
        assert "online won 0.545 (0.505 to 0.585) of 400 comparisons, and of its parts fell thing (0.800" in lines[0]


def test_a_task_that_falls_while_its_reward_rises_is_named() -> None:
    model = facts()
    sides = {"before": side(0.3, 0.3, 0.3, thing=0.8), "model": side(0.5, 0.1, 0.3, thing=0.5)}
    model.chat["preferences"]["dpo"] = compared("rlvr", sides)
    (line,) = caveat_lines(model, "**A reward rose and its task fell**: from RLVR to DPO")
    assert line.endswith("fell (0.300 ± 0.010 → 0.100 ± 0.010). What rose: no part by itself. What fell: thing (0.800 ± "
                         "0.010 → 0.500 ± 0.010).")  # fmt: skip


def test_the_task_and_the_parts_are_beside_the_win_rate() -> None:
    model = facts()
    model.chat["preferences"]["dpo"] = compared("rlvr", {"before": side(0.3, 0.3, 0.9), "model": side(0.5, 0.5, 0.1)})
    assert chat_tables.wins(model.chat["preferences"]) == [
        "|  | DPO against RLVR |",
        "|---|---|",
        "| requests: won, tied, lost | 400: 4, 5, 6 |",
        "| wins, ties as half (95 %) | 0.500 (0.460 to 0.540) |",
        "| does what was asked (`task`) | 0.300±0.010 → 0.500±0.010 |",
        "| preference reward | 0.300±0.010 → 0.500±0.010 |",
        "| parts of it that rose | none |",
        "| parts of it that fell | ending 0.900±0.010 → 0.100±0.010 |",
    ]
    assert chat_tables.wins({}) == []


def test_rewards_of_a_log_with_few_steps_say_nothing() -> None:
    assert log(0.1, 0.2, 0.9).rewards == {}
    rewards = log(*(n / 20 for n in range(20))).rewards["add"]
    assert json.dumps(rewards) and rewards["first"]["n"] == rewards["last"]["n"] == 5
