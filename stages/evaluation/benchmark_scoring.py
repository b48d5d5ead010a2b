"""Scores of the packaged task sets whose answers are checked by this project's verifiers.

lm-evaluation-harness checks code in its own process, and MATH by a parser that this project's own verifier excludes
(antlr 4.11). Here, code runs in the sandbox of reinforcement learning alone, and an answer of MATH is compared by
math-verify with a limit on its time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from stages.rl.protocols import Response, Verifier, make_verifier, obstacle
from stages.rl.rollout.task_sources.stored_tasks import check_of, tests_of
from stages.tasks import Row
from stages.tasks.benchmarks import OWN_TASKS, TaskSet

# The metric of these tasks.
SOLVED = "solved"
# The verifier of the tasks of each set.
VERIFIERS = {"math": "math-verify", "humaneval": "python-tests", "mbpp": "python-tests"}
BOX = "\\boxed{"


@cache
def _verifier(name: str) -> Verifier:
    """Returns a verifier, which stays for all items of a process.

    Raises:
        AtomError: It cannot run on this machine.
    """
    return make_verifier(name)


def obstacle_of(task_sets: Iterable[TaskSet]) -> str | None:
    """Returns the reason why answers to one of these sets cannot be scored on this machine, if any."""
    scored_here = {task_set.name for task_set in task_sets if task_set.folder == str(OWN_TASKS)}
    return obstacle([VERIFIERS[name] for name in scored_here], {})


def _solved(verifier: str, row: Row, answer: str) -> dict[str, float]:
    (parts,) = _verifier(verifier).score([(row, Response(answer, answer, finished=True))])
    return {SOLVED: parts["reward"]}


def math_results(item: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Returns whether an answer equals that in the last box of the solution of an item of MATH."""
    row = {"question": item["problem"], "expected_answer": last_box(item["solution"])}
    return _solved("math-verify", row, answers[0])


def last_box(solution: str) -> str:
    """Returns the last LaTeX box of a solution, with what it holds; "" without one."""
    start = solution.rfind(BOX)
    depth = 0
    for end in range(start + len(BOX) - 1, len(solution)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if not depth:
            return solution[start : end + 1]
    return ""


def humaneval_results(item: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Returns whether an answer to an item of HumanEval passes its tests, which define `check`."""
    name = item["entry_point"]
    # Imports and functions that the prompt has before the one to complete.
    before, _, _ = item["prompt"].partition(f"def {name}(")
    row = {"id": item["task_id"], "entry_point": name, "check": item["test"], "prelude": before}
    return _solved("python-tests", row, program(item["prompt"], answers[0], name))


def checkable(items: Any) -> Any:
    """Returns the items of MBPP whose asserts call one function, which is what an answer must define."""
    return items.filter(lambda item: tests_of(item["test_list"]) is not None)


def mbpp_results(item: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Returns whether an answer to an item of MBPP passes its asserts."""
    tests = tests_of(item["test_list"])
    assert tests is not None, "`checkable` leaves such items out"
    name, asserts = tests
    prelude = item["test_setup_code"] or ""
    row = {"id": str(item["task_id"]), "entry_point": name, "check": check_of(asserts), "prelude": prelude}
    return _solved("python-tests", row, program("", answers[0], name))


def program(prompt: str, answer: str, name: str) -> str:
    """Returns the program of an answer that may have a block of code, or complete the prompt.

    Args:
        prompt: The beginning of a function, which an answer without it completes.
        answer: The answer.
        name: Name of the function.
    """
    from stages.rl.rewards.code_verifier import blocks_of, code_of

    if blocks_of(answer):
        return code_of(answer, name)
    if not prompt or re.search(rf"^(?:async )?def {re.escape(name)}\b", answer, re.MULTILINE):
        return answer
    # The stage takes off the blanks before an answer in conversation.
    body = answer if answer[:1].isspace() else f"    {answer}"
    # A model that goes on after the function writes at the left margin.
    lines = body.split("\n")
    end = next((n for n, line in enumerate(lines) if n and line[:1].strip()), len(lines))
    return prompt + "\n".join(lines[:end]) + "\n"
