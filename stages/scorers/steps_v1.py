"""Scorer `steps`, version 1: the intermediate values of an answer, and its result. Frozen: a change is a new version in
a new file.

Row: `expected_answer`; `steps`, the right intermediate values in their order, each `name=value` or a value alone;
`weights`, {`answer`, `steps`}, of a sum of at most 1.

An answer is work and a result: `<think>` work `</think>` result, or, without reasoning, work, a colon and the result.
The result is what stands after the last colon. Statements of the work are separated by `;` or line ends; where the
row's steps have names, statements without `=` are prose. A last step whose value is the result states no intermediate
value.

The share of right steps is that of the longest common subsequence with the row's steps, and every statement beyond
their number takes one right step away: repeating a right step, or stating several values for one, gives less than
stating it once. The reward of an answer without steps is that of its result alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def split_answer(text: str, expected: str) -> tuple[str, str]:
    """(work, result) of an answer's text. An answer whose reasoning is not closed has no result. expected: the right
    result, which may contain colons."""
    reasoning, closed, after = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return "", ""
    fields = after.split(":")
    width = min(len(fields), 1 + expected.count(":"))
    work = reasoning.replace("<think>", "\n")
    return work if work.strip() else ":".join(fields[:-width]), ":".join(fields[-width:])


def statements(work: str, named: bool) -> list[str]:
    """The statements of a work without white space; named: only those with `=`."""
    pieces = ("".join(piece.split()) for piece in re.split(r"[;\n]", work))
    return [piece for piece in pieces if piece and ("=" in piece or not named)]


def value_of(statement: str) -> str:
    return statement.rpartition("=")[2]


def common(expected: Sequence[str], stated: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(stated) + 1)
    for step in expected:
        diagonal = 0
        for i, statement in enumerate(stated, 1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if step == statement else max(lengths[i], lengths[i - 1])
    return lengths[-1]


def share_of_steps(expected: Sequence[str], stated: list[str], result: str) -> float:
    """The share of right steps, from 0 to 1. Takes time linear in the answer."""
    if len(stated) > len(expected) and value_of(stated[-1]) == result:
        stated = stated[:-1]
    surplus = max(0, len(stated) - len(expected))
    if surplus >= len(expected):
        return 0.0
    return max(0, common(expected, stated) - surplus) / len(expected)


def score(row: Mapping[str, Any], text: str, finished: bool) -> dict[str, float]:
    """text: of the whole answer, reasoning included. `task` is 1 if the result is right, `steps` the share of right
    steps. Raises ValueError for a row that cannot be scored."""
    expected = " ".join(str(row.get("expected_answer", "")).split())
    weights, steps = row.get("weights"), row.get("steps")
    if not expected:
        raise ValueError("no expected_answer")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or len(steps) > 1000:
        raise ValueError("steps is no list of at most 1000 texts")
    named = any("=" in step for step in steps)
    right = [piece for step in steps for piece in statements(step, named)]
    if right and value_of(right[-1]) == "".join(expected.split()):
        right.pop()
    if not right:
        raise ValueError("steps has no intermediate value")
    if not isinstance(weights, Mapping) or sorted(weights) != ["answer", "steps"]:
        raise ValueError("weights does not have exactly the fields answer and steps")
    numbers = list(weights.values())
    if not all(isinstance(x, (int, float)) and x >= 0 for x in numbers) or not 0 < sum(numbers) <= 1:
        raise ValueError("weights are no two numbers from 0 on with a sum above 0 and at most 1")
    work, result = split_answer(text, expected)
    result = " ".join(result.split())
    if not finished or not result:
        return {"reward": 0.0, "task": 0.0, "steps": 0.0, "finished": float(finished)}
    task, share = float(result == expected), share_of_steps(right, statements(work, named), "".join(result.split()))
    reward = weights["answer"] * task + weights["steps"] * share
    return {"reward": reward, "task": task, "steps": share, "finished": 1.0}
