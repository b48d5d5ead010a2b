"""The difference of two models on the items of a task set: what is noise, and what is not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from release.cards import tables
from release.facts.model_facts import ModelFacts, Parameters
from release.facts.score_facts import HarnessFacts
from stages.confidence import clustered
from stages.evaluation.benchmark_changes import BETTER, UNCLEAR, WORSE, changes, pooled

STATED = {"set": {"pooled": False, "lower": ["errors"], "metrics": [], "tasks": ["one", "two"]}}


def rows(values: list[float], metric: str = "acc", task: str = "one", **more: str) -> list[dict[str, Any]]:
    row = {"set": "set", "task": task, "metric": metric, "filter": "none", **more}
    return [{**row, "number": number, "value": value} for number, value in enumerate(values)]


def verdict(before: list[float], after: list[float], metric: str = "acc") -> str:
    tables = {"base": rows(before, metric), "sft": rows(after, metric)}
    (change,) = changes(tables, dict.fromkeys(tables, STATED))["changes"]
    return change["verdict"]


def test_items_decide_and_not_the_two_means() -> None:
    """The same two shares of right answers, 0.50 and 0.56 of 400: clear if few items changed, noise if many did."""
    before = [float(n % 2) for n in range(400)]
    few = [1.0 if n % 2 or n < 48 else 0.0 for n in range(400)]
    many = [float(n % 2 == 0) if n < 352 else 1.0 for n in range(400)]
    assert sum(few) == sum(many) == 224
    assert verdict(before, few) == BETTER and verdict(few, before) == WORSE
    assert verdict(before, many) == verdict(many, before) == UNCLEAR
    assert verdict(before, before) == UNCLEAR


def test_a_few_changed_answers_are_no_evidence() -> None:
    """Of 1,000 items, five of five changed for the better are chance one time in sixteen, and six one in 32."""
    before = [0.0] * 1000
    assert verdict(before, [1.0] * 5 + before[5:]) == UNCLEAR
    assert verdict(before, [1.0] * 6 + before[6:]) == BETTER
    assert verdict(before, [1.0] * 6 + before[6:], "errors") == WORSE, "an error more is no gain"


def test_models_without_a_difference_are_rarely_told_apart() -> None:
    draw = random.Random(0)
    wrong = sum(
        verdict(*([float(draw.random() < 0.6) for _ in range(200)] for _ in range(2))) != UNCLEAR for _ in range(200)
    )
    print(f"{wrong} of 200 pairs of equal models")
    assert wrong < 24


def test_each_model_is_compared_with_the_one_before_and_the_last_with_the_first() -> None:
    """A metric that one of them lacks, and the share of answers that were cut off, are not compared; the subjects of a
    set are, together."""
    tables = {
        "base": rows([0, 1]) + rows([0, 1], task="two"),
        "sft": rows([1, 1]) + rows([1, 1], task="two") + rows([0, 0], "cut_off") + rows([1, 1], form="chat"),
        "rlvr": rows([1, 1]) + rows([0, 1], task="two") + rows([1, 1], "cut_off") + rows([1, 0], form="chat"),
    }
    stated = {"set": {**STATED["set"], "pooled": True}}
    found = changes(tables, dict.fromkeys(tables, stated))
    assert found["models"] == list(tables)
    assert [(c["before"], c["after"], c["task"], c["metric"], c["change"]["n"]) for c in found["changes"]] == [
        ("base", "sft", "", "acc,none", 4),
        ("sft", "rlvr", "", "acc,none", 4),
        ("sft", "rlvr", "", "acc,none,chat", 2),
        ("base", "rlvr", "", "acc,none", 4),
    ]
    assert [c["change"]["value"] for c in found["changes"]] == [0.5, -0.25, -0.5, 0.25]
    shown = {"set": {**stated["set"], "metrics": ["acc_norm,none"]}}
    assert changes(tables, dict.fromkeys(tables, shown))["changes"] == []


def test_a_mean_over_all_tasks_weighs_items_alike() -> None:
    values = {"one": [0.0, 1.0, 1.0, 1.0], "two": [0.0, 0.0]}
    ((metric, figure),) = pooled({task: {"acc,none": clustered(each)} for task, each in values.items()})
    assert (metric, figure["n"], figure["value"]) == ("acc,none", 6, pytest.approx(0.5))
    assert figure["se"] == pytest.approx(4 * 0.25 / 6)


def test_a_card_shows_changes_up_to_its_model() -> None:
    values = {"base": [0, 1] * 20, "sft": [1, 1] * 20, "rlvr": [0, 1] * 20}
    found = {name: rows([float(v) for v in each]) for name, each in values.items()}
    stated = {"set": {**STATED["set"], "license": "MIT", "license_evidence": "this test", "revision": None}}
    facts = HarnessFacts({}, stated, changes(found, dict.fromkeys(found, STATED))["changes"])
    cards = []
    for name in ("sft", "rlvr"):
        scores: Any = {each: {} for each in list(values)[: list(values).index(name) + 1]}
        cards.append(tables.benchmark_changes(ModelFacts("A", {}, None, Parameters(1, 1, 1), scores, harness=facts)))
    assert [len(lines) - 4 for lines in cards] == [1, 3], "a card compares with earlier models alone"
    row = "| base → after SFT | set: one | acc | as plain text | +0.500 (+0.338 to +0.662) | better |"
    assert cards[0][-1].split(" | ")[1:] == row.split(" | ")[1:] and cards[1][-2].endswith("| worse |")
    assert cards[1][-1].endswith("| no clear change |")
