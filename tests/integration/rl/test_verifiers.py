"""Verifiers: right, wrong and half-right answers, and hostile ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from stages.rl.protocols import Verifier, VerifierFailed, make_verifier
from stages.rl.rollout.task_sources.procedural_tasks import reasoning_gym_rows
from stages.scorers.instructions_v1 import CHECKS
from stages.tasks import question, to_row
from stages.tasks.synthetic import problems
from tests.fixtures.verifier_fixtures import (
    ARGUMENTS,
    Server,
    client,
    form_row,
    gym_row,
    score_one,
    scoring_handler,
    sum_row,
)

HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "tower": "9**9**9",
    "tower in LaTeX": "$9^{9^{9^{9}}}$",
    "factorial": "$10^{10^{10}}!$",
    "many digits": "4" * 100_000,
    "parentheses": "(" * 50_000 + "4" + ")" * 50_000,
    "braces": "$" + "{" * 3000 + "4" + "}" * 3000 + "$",
    "fractions": "\\boxed{" + "\\frac{1}{" * 2000,
    "brackets": "[" * 100_000,
    "chevrons": "<" * 300_000 + "\n" + "<<" * 100_000 + ">",
    "asterisks": "*a" * 100_000 + "*" * 100_000,
    "spaces": " " * 300_000 + "x",
    "python": "__import__('os').system('touch {trace}')",
    "python in LaTeX": "$\\operatorname{{__import__('os').system('touch {trace}')}}$ \\boxed{{exec(\"open('{trace}','w')\")}}",
    "python list": "[__import__('pathlib').Path('{trace}').touch()]",
    "sympy": "sympify(\"open('{trace}', 'w')\")",
    "file": "\\input{/etc/passwd} \\write18{touch {trace}}",
    "lone surrogates": "\ud800\udfff 5 \udcff",
    "bytes": bytes(range(256)).decode("latin-1") * 20,
    "nul": "\x00" * 1000,
    "unicode digits": "٤ 四 ④ 𝟜",
    "right to left": "\u202e4\u202c" * 100,
    "json": '{"a":' * 20_000,
    "big json": '{"reward": 1e999, "x": NaN}',
    "unclosed thought": "<think> 4",
    "many stops": "a. " * 50_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_has_a_reward_and_does_nothing(
    kind: str, maths: Verifier, gym: Verifier, serve: Callable[..., Server], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    text = (
        HOSTILE[kind].replace("{trace}", str(trace)).replace("{{", "{") if "trace" in HOSTILE[kind] else HOSTILE[kind]
    )
    forms = form_row(*((name, ARGUMENTS[name]) for name in CHECKS))
    cases = [
        (make_verifier("exact"), sum_row()),
        (maths, sum_row()),
        (gym, gym_row()),
        (make_verifier("instructions"), forms),
        (client(serve(scoring_handler)), sum_row()),
    ]
    for scorer, row in cases:
        start = time.process_time()
        parts = score_one(scorer, row, text)
        # reasoning_gym gives the share of an answer that the right one makes up, however it got there.
        most = 0.1 if scorer is gym else 0
        assert 0 <= parts["reward"] <= most and parts["finished"] == 1, f"{scorer.name}: {parts}"
        assert time.process_time() - start < 60, f"{scorer.name} takes its time in this process"
    assert not trace.exists()


def test_the_versions_name_the_packages() -> None:
    versions = {name: make_verifier(name).version for name in ("math-verify", "reasoning-gym")}
    assert "math-verify 0.9" in versions["math-verify"] and "0.1.25" in versions["reasoning-gym"]


def test_a_row_is_nemo_gyms() -> None:
    row = to_row("a-1", "2+2?", "exact", "add", 3, expected_answer="4")
    assert row["responses_create_params"] == {"input": [{"role": "user", "content": "2+2?"}]}
    assert (row["id"], row["verifier"], row["kind"], row["level"], question(row)) == ("a-1", "exact", "add", 3, "2+2?")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert to_row("a-2", chat, "exact", "add", 3)["responses_create_params"]["input"] == chat


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_projects_own_tasks(task: str) -> None:
    rng, exact = random.Random(1), make_verifier("exact")
    for _ in range(50):
        p = problems.TASKS[task](rng)
        row = to_row("p", p.question, "exact", task, 0, question=p.question, expected_answer=p.answer)
        for right in (
            p.answer,
            f" {p.answer}\n",
            f"{p.steps}:{p.answer}",
            f"<think>{p.steps}</think>\n{p.answer}",
            f"It is: {p.answer}",
        ):
            assert score_one(exact, row, right) == {"reward": 1, "finished": 1}
        assert score_one(exact, row, p.answer, finished=False) == {"reward": 0, "finished": 0}
        for wrong in (
            p.answer + "0",
            "0" + p.answer,
            f"{p.answer}:{p.steps}",
            p.answer[1:],
            f"{p.answer}.",
            f"<think>{p.answer}",
        ):
            assert score_one(exact, row, wrong)["reward"] == 0


def test_an_expected_answer_may_hold_a_colon() -> None:
    row = to_row("t", "When?", "exact", "time", 0, expected_answer="10:30")
    exact = make_verifier("exact")
    assert [score_one(exact, row, text)["reward"] for text in ("10:30", "at: 10:30", "11:30", "30")] == [1, 1, 0, 0]
    with pytest.raises(VerifierFailed, match="row t: no expected_answer"):
        score_one(exact, {**row, "expected_answer": " "}, "")


# --- math-verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "answer", "reward"),
    [
        ("4", "4", 1),
        ("4", "So 2+2 is \\boxed{4}.", 1),
        ("4", "5, or rather $4$", 1),
        ("4", "The answer is $5$", 0),
        ("\\frac{1}{2}", "0.5", 1),
        ("0.5", "\\frac{2}{4}", 1),
        ("(x+1)^2", "$x^2+2x+1$", 1),
        ("(x+1)^2", "$x^2+2x-1$", 0),
        ("\\{1, 2\\}", "$\\{2,1\\}$", 1),
        ("[0, 1)", "$[0,1)$", 1),
        ("$x=3$", "x is $3$", 1),
        ("1,000", "1000", 1),
        ("4", "<think>4</think> 5", 0),
        (7, "\\boxed{7}", 1),
    ],
)
def test_mathematical_equality(maths: Verifier, expected: Any, answer: str, reward: int) -> None:
    assert score_one(maths, sum_row(expected), answer) == {"reward": reward, "finished": 1, "unreadable": 0}


def test_an_unfinished_answer_earns_nothing_from_any(
    maths: Verifier, gym: Verifier, serve: Callable[..., Server]
) -> None:
    form = form_row(("punctuation:no_comma", {}))
    server = serve(scoring_handler)
    for scorer, row, text in (
        (make_verifier("exact"), sum_row(), "4"),
        (maths, sum_row(), "4"),
        (gym, gym_row(), "6"),
        (make_verifier("instructions"), form, "ok"),
        (client(server), sum_row(), "4"),
    ):
        assert score_one(scorer, row, text)["reward"] == 1
        parts = score_one(scorer, row, text, finished=False)
        assert parts["reward"] == 0 and parts["finished"] == 0
    assert len(server.seen) == 1


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def test_reasoning_gyms_scores(gym: Verifier) -> None:
    rows = list(reasoning_gym_rows("spell_backward", 3, 2, 1, {"min_word_len": 4, "max_word_len": 6}))
    assert [row["id"] for row in rows] == ["spell_backward-3-0", "spell_backward-3-1"]
    assert all(row["kind"] == "spell_backward" and row["level"] == 1 for row in rows)
    assert rows == list(reasoning_gym_rows("spell_backward", 3, 2, 1, {"min_word_len": 4, "max_word_len": 6}))
    right = rows[0]["answer"]
    half = right[:-1] + ("a" if right[-1] != "a" else "b")
    assert score_one(gym, rows[0], f"<think>hm</think>{right}") == {"reward": 1, "finished": 1, "unreadable": 0}
    assert 0 < score_one(gym, rows[0], half)["reward"] < 1
    assert score_one(gym, rows[0], "1234")["reward"] == 0


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("no_such", "no_such' not registered"),
        ("countdown", "its own expected answer got a score of 0.01"),  # gives the answer to eval, by way of sympy
        ("bitwise_arithmetic", "its own expected answer got a score of 0.0"),
        ("rush_hour", "no answer to score by"),
        ("rearc", "its own expected answer got a score of 0.05"),  # JSON makes lists of its tuples
        ("game_of_life_halting", "the answer '\\?' got a score of 1.0"),
    ],
)
def test_datasets_that_cannot_be_scored_are_refused(dataset: str, words: str) -> None:
    with pytest.raises(AtomError, match=words):
        # Whether a board of this one lives on decides if garbage counts as right.
        reasoning_gym_rows(dataset, 1, 6 if dataset == "game_of_life_halting" else 1)


def test_settings_that_a_dataset_refuses() -> None:
    with pytest.raises(AtomError, match="reasoning_gym dataset gcd with {'min_value': 0}"):
        reasoning_gym_rows("gcd", 1, 1, settings={"min_value": 0})


def test_an_unknown_dataset_in_a_row_is_no_reward(gym: Verifier) -> None:
    with pytest.raises(VerifierFailed, match="row g1: ValueError: reasoning_gym has no dataset of_mine"):
        score_one(gym, gym_row("of_mine"), "6")
    with pytest.raises(VerifierFailed, match=r"row g1: the answer '\?' got a score of 1.0, so no answer to it can be"):
        score_one(gym, {**gym_row(), "answer": "?"}, "6")
    with pytest.raises(VerifierFailed, match="row g1: no metadata to score by"):
        score_one(gym, {k: v for k, v in gym_row().items() if k != "metadata"}, "6")
