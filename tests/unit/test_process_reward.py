"""Process rewards: traced programs and their values, answers that try to earn more than their steps are worth, and the
parts of rewards in logs and on cards."""

from __future__ import annotations

import contextlib
import io
import random
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from release.assembly import training
from release.assembly.model_facts import ModelFacts
from release.cards import training_tables
from stages.data.synthetic import problems
from stages.rl.protocols import Parts, Response, VerifierFailed, to_row
from stages.rl.rewards.registry import make_verifier, verifier_class
from stages.rl.rollout import rollouts
from stages.rl.rollout.tasks import TasksConfig

ROW = to_row(
    "t", "b=2+0", "steps", "trace", 4,
    expected_answer="9", steps=["b=2", "c=4", "a=7", "d=8"], weights={"answer": 0.6, "steps": 0.4},
)  # fmt: skip
ALL = "b=2;c=4;a=7;d=8"


def score(text: str, row: Any = ROW, finished: bool = True) -> Parts:
    (parts,) = make_verifier("steps").score([(row, Response.parse(text, finished))])
    return parts


@pytest.mark.parametrize("level", [None, *range(1, 9)])
def test_python_executes_a_traced_program_alike(level: int | None) -> None:
    rng = random.Random(7)
    for _ in range(100):
        problem = problems.trace(rng, level)
        *assignments, last = problem.question.split(";")
        variables: dict[str, Any] = {}
        values, printed = [], io.StringIO()
        for line in assignments:
            exec(line, variables)  # noqa: S102 - written by this project
            values.append(f"{line[0]}={variables[line[0]]}")
        with contextlib.redirect_stdout(printed):
            exec(last, variables)  # noqa: S102
        assert problem.steps.split(";") == values[1:-1] and printed.getvalue().strip() == problem.answer
        assert len(values) - 2 in ([level] if level else range(1, 5))
        assert all(before[2:] != after[2:] for before, after in pairwise(values))
    with pytest.raises(ValueError, match="trace has the levels 1 to 8"):
        problems.trace(rng, 9)


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_worked_forms_of_every_task_have_the_full_reward(task: str) -> None:
    level = 2
    settings = {"source": "worked-problems", "task": task, "levels": [level], "count": 20}
    (source,) = TasksConfig.model_validate({"sources": [settings], "seed": 0}).sources
    assert source.bins() == [f"{task}/{level}"]
    for row in source.rows(0, excluded=set()):
        work, answer = ";".join(row["steps"]), row["expected_answer"]
        for text in (f"<think>{work}</think>{answer}", f"<think>\n{work}\n</think>\n\n{answer}", f"{work}:{answer}",
                     f"<think>{' ; '.join(row['steps'])}</think>It is: {answer}"):  # fmt: skip
            assert score(text, row) == {"reward": 1, "task": 1, "steps": 1, "finished": 1}
        assert score(answer, row) == {"reward": 0.5, "task": 1, "steps": 0, "finished": 1}


@pytest.mark.parametrize(
    ("text", "task", "steps"),
    [
        ("9", 1, 0),  # the reward of an answer without steps is that of its result
        ("8", 0, 0),
        (f"<think>{ALL}</think>8", 0, 1),
        ("<think>b=2;c=4;a=7</think>9", 1, 0.75),
        ("<think>b=2;c=5;a=7;d=8</think>9", 1, 0.75),
        (f"<think>{ALL};e=9</think>9", 1, 1),  # the result as a last step
        (f"<think>\n</think>{ALL}:9", 1, 1),
        (f"<think>b=2</think>{ALL}:9", 1, 0.25),  # reasoning is the work where there is some
        ("<think>First, b = 2.0 or so\nc=4\nso a=7\nd=8</think>9", 1, 0.5),
        # what earns nothing
        ("<think>e=9</think>9", 1, 0),  # the result as the only step
        ("<think>e=9;e=9;e=9;e=9</think>9", 1, 0),
        ("<think>2;4;7;8</think>9", 1, 0),  # values without their names
        ("<think>d=8;a=7;c=4;b=2</think>9", 1, 0.25),  # in another order
        # what earns less than stating each step once
        (f"<think>{ALL};d=8</think>9", 1, 0.75),
        ("<think>b=2;b=2;b=2;b=2</think>9", 1, 0.25),
        ("<think>" + "b=2;" * 9 + "</think>9", 1, 0),
        ("<think>" + ";".join(f"{name}={n}" for name in "bcad" for n in range(10)) + "</think>9", 1, 0),
        ("<think>b=2;b=3;c=4;c=5;a=7;a=6;d=8;d=7</think>9", 1, 0),
        (f"<think>{ALL}</think>" + ":".join("0123456789"), 1, 1),  # of several results the last one counts
        (f"<think>{ALL}</think>" + ":".join("9876543210"), 0, 1),
    ],
)  # fmt: skip
def test_right_steps_count_once_and_surplus_ones_against_them(text: str, task: int, steps: float) -> None:
    parts = score(text)
    assert parts == {"reward": pytest.approx(0.6 * task + 0.4 * steps), "task": task, "steps": steps, "finished": 1}


@pytest.mark.parametrize("text", ["", f"<think>{ALL}", f"<think>{ALL}</think>", f"{ALL}:", f"<think>{ALL}</think>\n:"])
def test_an_answer_without_a_result_has_no_reward(text: str) -> None:
    assert score(text)["reward"] == 0
    assert score(f"<think>{ALL}</think>9", finished=False) == {"reward": 0, "task": 0, "steps": 0, "finished": 0}


def test_hostile_answers_take_little_time() -> None:
    for text in ("b=2;" * 200_000 + ":9", "=" * 500_000, ":" * 500_000, "<think>" * 100_000, "\n;" * 300_000 + "9"):
        assert score(text)["steps"] == 0


def test_results_and_steps_of_rows_by_others() -> None:
    minutes = {**ROW, "expected_answer": "10:30", "steps": ["60 * 2 = 120", "leaves = 10:00"]}
    assert score("60*2=120\nleaves=10:00: 10:30", minutes)["reward"] == 1
    ordered = {**ROW, "expected_answer": "0123", "steps": ["3", "13", "013", "0123"]}
    assert [score(f"{work}:0123", ordered)["steps"] for work in ("3;13;013;0123", "3;13;013", "0123")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expected_answer": " "}, "no expected_answer"),
        ({"steps": "b=2"}, "steps is no list"),
        ({"steps": [2]}, "steps is no list"),
        ({"steps": ["a=1"] * 1001}, "steps is no list of at most 1000"),
        ({"steps": ["e=9"]}, "steps has no intermediate value"),
        ({"weights": {"answer": 1}}, "weights does not have exactly the fields"),
        ({"weights": {"answer": 1, "steps": 0.1}}, "weights are no two numbers"),
        ({"weights": {"answer": float("nan"), "steps": 0.1}}, "weights are no two numbers"),
        ({"weights": {"answer": 0, "steps": 0}}, "weights are no two numbers"),
    ],
)
def test_a_row_that_cannot_be_scored_is_no_reward_of_0(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(VerifierFailed, match=f"verifier steps, row t: {words}"):
        score("9", {**ROW, **fields})


def test_weights_are_settings_with_a_reward_of_at_most_1() -> None:
    source = {"source": "worked-problems", "task": "trace", "levels": [3], "count": 2}
    weighted = {**source, "weights": {"answer": 0.25, "steps": 0.75}}
    (tasks,) = TasksConfig.model_validate({"sources": [weighted], "seed": 0}).sources
    row, other = tasks.rows(0, excluded=set())
    assert row["question"] != other["question"] and score(row["expected_answer"], row)["reward"] == 0.25
    for weights in ({"answer": 0.8, "steps": 0.8}, {"answer": 0.0, "steps": 0.0}):
        with pytest.raises(ValidationError, match="give no reward between 0 and 1"):
            TasksConfig.model_validate({"sources": [{**source, "weights": weights}], "seed": 0})


def drawn(kind: str, verifier: str, parts: Parts) -> rollouts.Rollout:
    return rollouts.Rollout(
        step=1, wave=0, group=0, sample=0, task="t", kind=kind, level=0, policy="", seed=0, prompt_ids=[], ids=[],
        logprobs=[], text="", finished=True, reward=parts["reward"], parts=parts, verifier=verifier,
        verifier_version="1", dropped="",
    )  # fmt: skip


def test_the_log_and_the_card_have_the_parts() -> None:
    def logged(verifier: str) -> tuple[str, ...]:
        return verifier_class(verifier).logged_parts

    traces = [
        drawn("trace", "steps", {"reward": 0.5, "task": t, "steps": 1 - t, "finished": 1}) for t in (0.0, 1.0, 1.0)
    ]
    others = [drawn("add", "exact", {"reward": 1.0, "finished": 1.0})]
    means = rollouts.mean_parts([*others, *traces], logged)
    assert means == {"trace": {"task": pytest.approx(2 / 3), "steps": pytest.approx(1 / 3)}}
    assert rollouts.mean_parts(others, logged) == {}
    lines = [{"step": n, "tokens": n, "rewards": {"trace": 0.5}, "parts": {"trace": {"task": n / 8, "steps": 1.0}}}
             for n in range(8)]  # fmt: skip
    facts = ModelFacts("Qwen3MoeForCausalLM", {}, None, {}, {}, {}, {}, training={"rlvr": training.log_facts(lines)})
    assert training_tables.process_rewards(facts)[2:] == [
        "| RLVR | trace | steps | 1.000±0.000 | 1.000±0.000 |",
        "| RLVR | trace | task | 0.062±0.062 | 0.812±0.062 |",
    ]
    facts.training["rlvr"] = training.log_facts([{k: v for k, v in line.items() if k != "parts"} for line in lines])
    assert training_tables.process_rewards(facts) == []
