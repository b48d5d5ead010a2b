"""Scores code by tests, with the expected values out of the code's reach.

An answer's functions run in a sandbox that is sent arguments and sends back plain data, never more. Tests that are a
list of inputs and expected values are compared here. Tests that are a program with asserts (HumanEval's check) run in a
second sandbox, where the candidate is a stand-in that asks the first. So an answer that ends its process, rewrites
modules, searches memory or returns objects that equal everything has changed what it returns, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.rl.contracts import Parts, Response, Row, VerifierFailed
from stages.rl.sandbox import Limits, Pool, SandboxFailed
from stages.rl.sandbox.calls import decode, encode
from stages.rl.sandbox.cell import Cell, twice
from stages.rl.sandbox.running import Running

LONGEST = 256 << 10
"""Characters of an answer beyond which it is not run."""

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_of(answer: str, entry_point: str) -> str:
    """The last fenced block that defines the entry point, or else the last, or else the whole answer."""
    blocks = BLOCK.findall(answer)
    named = [block for block in blocks if f"def {entry_point}" in block]
    return str((named or blocks or [answer])[-1])


class CodeVerifier:
    """Rows have `entry_point`, the name of the function, and one of

    - `tests`: a list of {"input": positional arguments, "expected": value}, all of JSON; a tuple counts as a list, and
      an expected float may be missed by 1e-9;
    - `check`: Python that defines `check(candidate)`, as HumanEval's does. It passes and is given plain data.

    `prelude`, if there, is Python that goes before the answer and before the check. A check may use four times what an
    answer may; one that ends without a verdict nevertheless says nothing of the answer.
    """

    name = "python-tests"
    version = "1"
    runs_code = True

    def __init__(self, workers: int | None = None, limits: Limits | None = None) -> None:
        """Raises SandboxFailed where no sandbox starts; stages.rl.sandbox.missing says why."""
        limits = limits or Limits()
        patient = replace(limits, cpu_seconds=4 * limits.cpu_seconds, wall_seconds=4 * limits.wall_seconds)
        self._pool = Pool(workers, limits, [patient])  # the second is for checks

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        """Raises VerifierFailed where a sandbox failed or a row's tests cannot be run."""
        return self._pool.each(self._score, answers)

    def close(self) -> None:
        self._pool.close()

    def _score(self, cells: list[Cell], item: tuple[Row, Response]) -> Parts:
        row, response = item
        if not isinstance(row.get("entry_point"), str) or not (row.get("tests") or row.get("check")):
            raise self._failed(row, "it has no entry_point with tests or a check")
        passed = 0.0
        if response.finished and response.answer.strip() and len(response.answer) <= LONGEST:
            source = row.get("prelude", "") + "\n" + code_of(response.answer, row["entry_point"])
            job = {"role": "answer", "source": source, "entry_point": row["entry_point"], "stdin": ""}
            judge = self._compare if row.get("tests") else self._check
            try:
                passed = twice(cells, lambda: judge(cells, job, row))
            except SandboxFailed as e:
                raise self._failed(row, str(e)) from e
        return {"reward": float(passed == 1.0), "passed": passed}

    def _compare(self, cells: list[Cell], job: dict[str, Any], row: Row) -> float:
        passed = 0
        with cells[0].begin(job) as answer:
            alive = answer.ask() is not None
            for test in row["tests"]:
                line = answer.ask(json.dumps({"call": encode([list(test["input"]), {}])}).encode()) if alive else None
                alive = line is not None
                passed += line is not None and returned(line, test["expected"])
        return passed / len(row["tests"])

    def _check(self, cells: list[Cell], job: dict[str, Any], row: Row) -> float:
        source = row.get("prelude", "") + "\n" + row["check"]
        with cells[0].begin(job) as answer:
            if answer.ask() is None:
                return 0.0
            with cells[1].begin({**job, "role": "check", "source": source}) as check:
                return self._relay(answer, check, row)

    def _relay(self, answer: Running, check: Running, row: Row) -> float:
        """Carries calls and what they return between the two, up to the check's verdict."""
        line, replies = check.ask(), 0
        while line is not None:
            message = json.loads(line)
            if "verdict" in message:
                if message["verdict"] is None:
                    raise self._failed(row, message["reason"])
                return float(message["verdict"] is True)
            reply = answer.ask(line)
            if reply is None:
                return 0.0
            replies += 1
            line = check.ask(reply)
        raise self._failed(row, f"its check ends without a verdict after {replies} calls: {check.finish()}")

    def _failed(self, row: Row, why: str) -> VerifierFailed:
        return VerifierFailed(f"verifier {self.name} cannot judge row {row.get('id', '(no id)')}: {why}")


def returned(line: bytes, expected: Any) -> bool:
    """Whether a line from an answer's sandbox, which may hold anything, says that the expected value was returned."""
    try:
        return same(decode(json.loads(line)["value"]), expected)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
        return False


def same(value: Any, expected: Any) -> bool:
    """Equality of plain data with JSON: True is not 1, a tuple is a list, a key that is no string is its JSON."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(expected, float) and isinstance(value, int | float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(expected, list) and isinstance(value, list | tuple):
        return len(value) == len(expected) and all(same(*pair) for pair in zip(value, expected, strict=True))
    if isinstance(expected, dict) and isinstance(value, dict):
        named = {k if isinstance(k, str) else json.dumps(k): v for k, v in value.items()}
        return named.keys() == expected.keys() and all(same(named[k], v) for k, v in expected.items())
    return bool(value == expected)
