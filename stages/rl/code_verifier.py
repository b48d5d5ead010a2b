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
from stages.rl.sandbox.cell import Cell
from stages.rl.sandbox.running import Running

LONGEST = 256 << 10
"""Characters of an answer beyond which it is not run."""

RUN = re.compile(r"`{3,}|~{3,}")


def code_of(answer: str, entry_point: str) -> str:
    """The first fenced block that defines the entry point, whatever the fence is named and whatever the blocks after it
    define; where none does, the last block; where there is none, the whole answer."""
    blocks = blocks_of(answer)
    name = re.escape(entry_point)
    statement, assignment = rf"(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b", rf"{name}[ \t]*(?::[^=\n]*)?=(?!=)"
    defines = re.compile(f"^(?:{statement}|{assignment})", re.MULTILINE)
    named = [block for block in blocks if defines.search(block)]
    return (named[:1] or blocks[-1:] or [answer])[0]


def blocks_of(answer: str) -> list[str]:
    """The fenced blocks of Markdown, without the indentation of their fences (CommonMark 0.31, section 4.5). Beyond it,
    a fence of backticks may open after words and close after code. One that does not close goes to the end."""
    blocks: list[list[str]] = []
    fence, indent = "", 0
    for line in answer.split("\n"):
        bare, margin = line.rstrip(), len(line) - len(line.lstrip(" \t"))
        if fence:
            code = bare.rstrip(fence[0])
            if len(bare) - len(code) >= len(fence) and (
                margin <= indent + 3 if not code.strip() else "```" not in code
            ):
                blocks[-1] += [code[min(indent, margin) :]] if code.strip() else []
                fence = ""
            else:
                blocks[-1].append(line[min(indent, margin) :])
        elif opening := RUN.search(bare):
            words, tag, ticks = bare[: opening.start()].strip(), bare[opening.end() :], opening[0][0] == "`"
            if not (ticks and "`" in tag) and (not words or (ticks and len(tag.split()) <= 1)):
                fence, indent = opening[0], 0 if words else margin
                blocks.append([])
    return ["".join(f"{line}\n" for line in block) for block in blocks]


class CodeVerifier:
    """Rows have `entry_point`, the name of the function, and one of

    - `tests`: a list of {"input": positional arguments, "expected": value}, all of JSON; a tuple counts as a list, and
      an expected float may be missed by a billionth of itself, 0.0 by a billionth;
    - `check`: Python that defines `check(candidate)`, as HumanEval's does. It passes and is given plain data.

    `prelude`, if there, is Python that goes before the answer and before the check. A check may use four times what an
    answer may. One that ends without a verdict though the answer told it nothing is broken: VerifierFailed.

    Parts: `reward`; `passed`, the share of tests; `killed`, 1 if the answer was ended by force (time, memory, output, a
    signal), or what it returned ended the check so, or the sandbox died of it.
    """

    name = "python-tests"
    version = "2"
    runs_code = True

    def __init__(self, workers: int | None = None, limits: Limits | None = None) -> None:
        """Raises SandboxFailed where no sandbox starts; stages.rl.sandbox.missing says why."""
        limits = limits or Limits()
        patient = replace(limits, cpu_seconds=4 * limits.cpu_seconds, wall_seconds=4 * limits.wall_seconds)
        self._pool = Pool(workers, limits, [patient])  # the second is for checks

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        """Raises VerifierFailed where a sandbox failed or a row's tests cannot be run."""
        try:
            return self._pool.each(self._score, answers, lambda _: parts(0.0, killed=True))
        except SandboxFailed as e:
            raise VerifierFailed(f"verifier {self.name} cannot judge: {e}") from e

    def close(self) -> None:
        self._pool.close()

    def _score(self, cells: list[Cell], item: tuple[Row, Response]) -> Parts:
        row, response = item
        if not isinstance(row.get("entry_point"), str) or not (row.get("tests") or row.get("check")):
            raise self._failed(row, "it has no entry_point with tests or a check")
        if not response.finished or not response.answer.strip() or len(response.answer) > LONGEST:
            return parts(0.0)
        source = row.get("prelude", "") + "\n" + code_of(response.answer, row["entry_point"])
        job = {"role": "answer", "source": source, "entry_point": row["entry_point"], "stdin": ""}
        return self._compare(cells, job, row) if row.get("tests") else self._check(cells, job, row)

    def _compare(self, cells: list[Cell], job: dict[str, Any], row: Row) -> Parts:
        passed = 0
        with cells[0].begin(job) as answer:
            alive = answer.ask() is not None
            for test in row["tests"]:
                line = answer.ask(json.dumps({"call": encode([list(test["input"]), {}])}).encode()) if alive else None
                alive = line is not None
                passed += line is not None and returned(line, test["expected"])
            return parts(passed / len(row["tests"]), killed=not alive and by_force(answer))

    def _check(self, cells: list[Cell], job: dict[str, Any], row: Row) -> Parts:
        source = row.get("prelude", "") + "\n" + row["check"]
        with cells[0].begin(job) as answer:
            if answer.ask() is None:
                return parts(0.0, killed=by_force(answer))
            with cells[1].begin({**job, "role": "check", "source": source}) as check:
                return self._relay(answer, check, row)

    def _relay(self, answer: Running, check: Running, row: Row) -> Parts:
        """Carries calls and what they return between the two, up to the check's verdict."""
        line, replies = check.ask(), 0
        while line is not None:
            message = json.loads(line)
            if "verdict" in message:
                if message["verdict"] is None:
                    raise self._failed(row, message["reason"])
                return parts(float(message["verdict"] is True))
            reply = answer.ask(line)
            if reply is None:
                return parts(0.0, killed=by_force(answer))
            replies += 1
            line = check.ask(reply)
        if replies:  # what it returned can have done this
            return parts(0.0, killed=True)
        raise self._failed(row, f"its check ends without a verdict before it calls the candidate: {check.finish()}")

    def _failed(self, row: Row, why: str) -> VerifierFailed:
        return VerifierFailed(f"verifier {self.name} cannot judge row {row.get('id', '(no id)')}: {why}")


def parts(passed: float, killed: bool = False) -> Parts:
    return {"reward": float(passed == 1.0), "passed": passed, "killed": float(killed)}


def by_force(answer: Running) -> bool:
    """Whether an answer that has ended was ended by force, and not by itself."""
    return answer.finish().status not in ("ok", "error")


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
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=0.0 if expected else 1e-9)
    if isinstance(expected, list) and isinstance(value, list | tuple):
        return len(value) == len(expected) and all(same(*pair) for pair in zip(value, expected, strict=True))
    if isinstance(expected, dict) and isinstance(value, dict):
        named = {k if isinstance(k, str) else json.dumps(k): v for k, v in value.items()}
        return (
            len(named) == len(value)
            and named.keys() == expected.keys()
            and all(same(named[k], v) for k, v in expected.items())
        )
    return bool(value == expected)
