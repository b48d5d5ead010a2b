"""Verifier `python-tests`: scores code by tests, with the expected values out of the code's reach.

An answer's functions run in a sandbox that receives arguments and returns plain data only. The check, a program with
asserts (HumanEval's), runs in a second sandbox, where the candidate is a proxy that calls the first. An answer that
ends its process, rewrites modules, searches memory or returns objects that equal everything can therefore only change
its own return values.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pipeline.core.bounds import Range
from pipeline.core.stage import Config
from stages.rl import sandbox
from stages.rl.protocols import Answer, Parts, Verifier, VerifierContext, VerifierFailed
from stages.rl.sandbox import Limits, Pool, SandboxFailed
from stages.rl.sandbox.cell import Cell, Running
from stages.rl.sandbox.limits import Job
from stages.tasks import Row, question

# Characters of an answer beyond which it is not run.
MAX_ANSWER_CHARACTERS = 256 << 10

# Return values of programs that compute nothing, in Python.
CONSTANT_VALUES = ("None", "0", "1", "-1", "True", "False", '""', "[]", "{}", 'float("nan")', 'float("inf")')
RETURNS = "a function that returns {}"
NOT_A_NUMBER = RETURNS.format('float("nan")')
SHOWN = RETURNS.format("what the first test of the question expects")
# Bodies of functions that attack their check.
ATTACKS = {
    "a function that returns what equals everything": "return type('X', (), {'__eq__': lambda *_: True})()",
    "a function that ends the process": "import os; os._exit(0)",
    "a function that raises SystemExit": "raise SystemExit(0)",
}

FENCE = re.compile(r"`{3,}|~{3,}")
QUOTE = re.compile(r" {0,3}> ?")


def code_of(answer: str, entry_point: str) -> str:
    """Returns the code of an answer.

    It is the first fenced block that defines the entry point, with any name of the fence and any later blocks; if none
    does, the last block; without blocks, the whole answer.

    Line ends are those of Python, and byte order marks are ignored.
    """
    answer = re.sub("^\ufeff", "", re.sub("\r\n?", "\n", answer), flags=re.MULTILINE)
    name = re.escape(entry_point)
    statement, assignment = rf"(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b", rf"{name}[ \t]*(?::[^=\n]*)?=(?!=)"
    defines = re.compile(f"^(?:{statement}|{assignment})", re.MULTILINE)
    blocks: list[str] = []
    # Bare fences after words are opened only if no block defines the entry point without them.
    for bare_after_words in (False, True):
        blocks = blocks_of(answer, bare_after_words) or blocks
        for block in blocks:
            if defines.search(block):
                return block
    return (blocks[-1:] or [answer])[0]


def blocks_of(answer: str, bare_after_words: bool = False) -> list[str]:
    """Returns the fenced blocks of Markdown (CommonMark 0.31, sections 4.5 and 5.1).

    They are without the indentation of their fences and the markers of enclosing quotes.

    As an extension, a fence of backticks may open after words, if it has a name or `bare_after_words` is set. An
    unclosed block extends to the end, or to the last line of code that ends in a fence if the number of such lines is
    odd: fences inside a text of the code are paired.
    """
    blocks: list[list[str]] = []
    fence, indent, depth = "", 0, 0
    for raw_line in answer.split("\n"):
        offset = level = 0
        while (not fence or level < depth) and (mark := QUOTE.match(raw_line, offset)):
            offset, level = mark.end(), level + 1
        line = raw_line[offset:]
        if level < depth:  # the quote ends, and its fence with it
            fence, depth = "", 0
        stripped, indentation = line.rstrip(), len(line) - len(line.lstrip(" \t"))
        if fence:
            if (
                stripped.lstrip().startswith(fence)
                and not stripped.lstrip().strip(fence[0])
                and indentation <= indent + 3
            ):
                fence, depth = "", 0
            else:
                blocks[-1].append(line[min(indent, indentation) :])
        elif opening := FENCE.search(stripped):
            words, tag, ticks = stripped[: opening.start()].strip(), stripped[opening.end() :], opening[0][0] == "`"
            opens_fence = len(tag.split()) == 1 or (bare_after_words and not tag.strip())
            if not (ticks and "`" in tag) and (not words or (ticks and opens_fence)):
                fence, indent, depth = opening[0], 0 if words else indentation, level
                blocks.append([])
    if fence:
        ends = [n for n, line in enumerate(blocks[-1]) if line.rstrip().endswith(fence)]
        if len(ends) % 2:
            blocks[-1][ends[-1] :] = [blocks[-1][ends[-1]].rstrip().rstrip(fence[0])]
    return ["".join(f"{line}\n" for line in block) for block in blocks]


def shown_value(text: str) -> str | None:
    """Returns the value that passes the first assert of a text which compares a call with a constant, or asserts it."""
    for line in text.splitlines():
        if line.startswith("assert "):
            try:
                test = ast.parse(line).body[0]
                match test:
                    case ast.Assert(test=ast.Compare(left=ast.Call(), ops=[ast.Eq()], comparators=[value])):
                        return repr(ast.literal_eval(value))
                    case ast.Assert(test=ast.Compare(left=value, ops=[ast.Eq()], comparators=[ast.Call()])):
                        return repr(ast.literal_eval(value))
                    case ast.Assert(test=ast.Call()):
                        return "True"
                    case ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call())):
                        return "False"
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return None


class CodeSettings(Config):
    """Settings of the sandboxes in which answers run."""

    workers: Annotated[int, Range(1, 4096)] | None = None
    """answers that are scored at once; null: two for each core"""


class CodeVerifier(Verifier):
    """Scores code by running it against the tests of its row.

    A row has `entry_point`, the name of the function, and `check`, Python that defines `check(candidate)`, as that of
    HumanEval does. It passes and is given plain data.

    `prelude`, if present, is Python that runs before the answer and before the check. The limits of a check are four
    times those of an answer. A check that ends without a verdict before the answer replies is broken: VerifierFailed.

    Parts: `reward`; `killed`, 1 if the answer was killed (time, memory, output, a signal), if its return value led to
    the killing of the check, or if it killed the sandbox.
    """

    name = "python-tests"
    version = "4"
    Settings = CodeSettings

    def __init__(self, context: VerifierContext[CodeSettings], limits: Limits | None = None) -> None:
        """Starts the sandboxes.

        Args:
            context: Settings of the recipe.
            limits: Limits of an answer's program. No recipe sets them: scores depend on them, and they are not in the
                key.

        Raises:
            SandboxFailed: No sandbox starts.
        """
        limits = limits or Limits()
        check_limits = replace(limits, cpu_seconds=4 * limits.cpu_seconds, wall_seconds=4 * limits.wall_seconds)
        self._pool = Pool(context.settings.workers, limits, [check_limits])  # the second is for checks

    @classmethod
    def missing(cls) -> str | None:
        reason = sandbox.missing()
        return reason and f"tasks of the verifier {cls.name} run what the model writes: {reason}"

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Returns programs that compute nothing."""
        head = f"def {row.get('entry_point')}(*arguments, **options):\n    "
        programs = {RETURNS.format(value): f"{head}return {value}\n" for value in CONSTANT_VALUES}
        programs[RETURNS.format("its first argument")] = f"{head}return arguments[0] if arguments else None\n"
        programs |= {name: f"{head}{body}\n" for name, body in ATTACKS.items()}
        if (shown := shown_value(question(row))) is not None:
            programs[SHOWN] = f"{head}return {shown}\n"
        blocks = [f"```python\n{head}return {value}\n```" for value in CONSTANT_VALUES]
        programs["a block for each constant"] = "\n".join(blocks)
        programs["a check of its own"] = f"{head}pass\ncheck = lambda candidate: True\nassert True\n"
        return {"pass": "pass", **programs}

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Returns the parts of each answer's reward.

        Raises:
            VerifierFailed: A sandbox failed, or a row's tests cannot run.
        """
        try:
            return self._pool.map(self._score, answers, lambda _: parts(False, killed=True))
        except SandboxFailed as e:
            raise VerifierFailed(f"verifier {self.name} cannot score: {e}") from e

    def close(self) -> None:
        self._pool.close()

    def _score(self, cells: list[Cell], item: Answer) -> Parts:
        row, response = item
        if not isinstance(row.get("entry_point"), str) or not row.get("check"):
            raise self._failure(row, "it has no entry_point with a check")
        if not response.finished or not response.answer.strip() or len(response.answer) > MAX_ANSWER_CHARACTERS:
            return parts(False)
        job: Job = {
            "role": "answer",
            "prelude": row.get("prelude", ""),
            "source": code_of(response.answer, row["entry_point"]),
            "entry_point": row["entry_point"],
        }
        with cells[0].begin(job) as answer:
            # The first line tells that the answer's code has run. Without it there is nothing to check.
            if answer.ask() is None:
                return parts(False, killed=ended_by_force(answer))
            with cells[1].begin({**job, "role": "check", "source": row["check"]}) as check:
                return self._relay(answer, check, row)

    def _relay(self, answer: Running, check: Running, row: Row) -> Parts:
        """Relays calls and their return values between the two sandboxes, up to the check's verdict."""
        line, replies = check.ask(), 0
        while line is not None:
            if not line.startswith(b'{"call"'):  # which is not parsed here, at any depth or length
                message = json.loads(line)
                if message["verdict"] is None:
                    raise self._failure(row, message["reason"])
                return parts(message["verdict"] is True)
            reply = answer.ask(line)
            if reply is None:
                return parts(False, killed=ended_by_force(answer))
            replies += 1
            line = check.ask(reply)
        if replies:  # its return value may be the cause
            return parts(False, killed=True)
        raise self._failure(row, f"its check ends without a verdict before it calls the candidate: {check.finish()}")

    def _failure(self, row: Row, reason: str) -> VerifierFailed:
        return VerifierFailed(f"verifier {self.name} cannot score row {row.get('id', '(no id)')}: {reason}")


def parts(passed: bool, killed: bool = False) -> Parts:
    return {"reward": float(passed), "killed": float(killed)}


def ended_by_force(answer: Running) -> bool:
    """Returns True if an ended answer was killed."""
    return answer.finish().status not in ("ok", "error")
