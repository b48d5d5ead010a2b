"""No reward of a packaged recipe is had without doing the task: every one is attacked by every family of answers that
solve nothing, and a verifier with a planted hole of each family is found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache

import pytest

from bench import rewards
from pipeline.core.errors import AtomError
from stages.rl.protocols import Answer, Parts, Response, make_verifier
from stages.rl.rewards.pooled_verifier import PooledVerifier, Reply
from stages.rl.rollout.task_sources.procedural_tasks import reasoning_gym_rows
from stages.rl.rollout.tasks import probe, require_solving
from stages.rl.rollout.unsolved import FAMILIES
from stages.tasks import Row, question, right_answer, to_row
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

# Tasks of a bin.
TASKS = {"python-tests": 4, "math-verify": 48, "reasoning-gym": 64}
MANY = 240
ROWS = [
    to_row(f"{n}", f"How much is {n} plus {3 * n}?\nAnswer by a number.", "exact", "own", 1, expected_answer=str(4 * n))
    for n in range(40, 140)
]


def pays(condition: Callable[[Row, Response], bool]) -> Callable[[Sequence[Answer]], list[Parts]]:
    """Returns a verifier that rewards right answers, and others by a condition."""

    def score(answers: Sequence[Answer]) -> list[Parts]:
        return [
            {"reward": float((response.finished and response.answer == right_answer(row)) or condition(row, response))}
            for row, response in answers
        ]

    return score


# {family: a hole in a verifier}
HOLES: dict[str, Callable[[Row, Response], bool]] = {
    "constant": lambda row, response: response.answer == "nan",
    "frequent": lambda row, response: response.finished and response.text.isdecimal(),
    "echo": lambda row, response: response.answer in question(row).splitlines(),
    "several": lambda row, response: response.finished and right_answer(row) in response.answer.split(", "),
    "thinking": lambda row, response: response.finished and f"\n{right_answer(row)}\n</think>" in response.text,
    "unfinished": lambda row, response: response.answer == right_answer(row),
    "language": lambda row, response: response.answer.endswith("。"),
    "marker": lambda row, response: response.answer == "\\boxed{}",
    "form": lambda row, response: response.answer.startswith("Dear "),
}


def test_every_family_finds_a_hole_of_its_own() -> None:
    assert set(HOLES) == set(FAMILIES)
    notes = [to_row(row["id"], "Thank.", "courtesy", "own", 1, who="baker", what="bread") for row in ROWS]
    for family, hole in HOLES.items():
        rows = notes if family == "form" else ROWS
        probed = probe(rows, pays(hole), 0)
        best = [answer for answer in probed["answers"] if answer["reward"]["value"] > probed["chance"] + 0.5]
        assert family in {answer["family"] for answer in best}, (family, probed)
        assert all(answer["reward"]["n"] == len(ROWS) - 16 for answer in best), "on other tasks than it was chosen by"
        with pytest.raises(AtomError, match="which solves nothing, earns a mean reward of 1.000"):
            require_solving(family, probed)
        require_solving(family, probe(rows, pays(lambda row, response: False), 0))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled verifiers without their pool: a process for each answer would take minutes."""
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    scorer = cache(lambda verifier: verifier.load_scorer())

    def request(self: PooledVerifier, row: Row, fields: str, answer: str) -> Reply:
        try:
            return {"score": scorer(type(self))(row)(answer)}
        except Exception as error:
            return {"error": repr(error)}

    monkeypatch.setattr(PooledVerifier, "_request", request)


@pytest.mark.parametrize("verifier", ["reasoning-gym", "math-verify", "exact", "courtesy", "instructions"])
def test_no_packaged_reward_is_had_without_solving(verifier: str, in_this_process: None) -> None:
    check(verifier)


def test_roles_that_contradict_each_other_earn_too_much(in_this_process: None) -> None:
    """So no recipe has this dataset of reasoning-gym: whoever is both in an answer is right in one of the two."""
    rows = reasoning_gym_rows("knights_knaves", 0, 64, 1)
    verifier = make_verifier("reasoning-gym")
    probed = probe(rows, verifier.score, 0)
    verifier.close()
    assert probed["answers"][0]["name"] == "one is both" and probed["answers"][0]["reward"]["value"] > 0.6
    with pytest.raises(AtomError, match="tasks knights_knaves/1: one is both, which solves nothing"):
        require_solving("knights_knaves/1", probed)


@NEEDS_BUBBLEWRAP
def test_no_packaged_reward_of_code_is_had_without_solving() -> None:
    check("python-tests")


def check(verifier: str) -> None:
    sources = {name: source for name, source in rewards.packaged_sources().items() if source.verifier == verifier}
    assert sources, "no packaged recipe has this reward: attack another one"
    probed = rewards.measure(sources, TASKS.get(verifier, MANY))
    for name, each in probed.items():
        require_solving(name, each)
        assert {answer["family"] for answer in each["answers"]} >= set(FAMILIES) - {"frequent", "several", "form"}
