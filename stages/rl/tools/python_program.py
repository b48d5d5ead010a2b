"""Tool `python`: runs a program in the sandbox, and gives what it prints (docs/sandbox.md).

Each call is a program of its own: no variable and no file of an earlier one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pipeline.core.bounds import Range
from pipeline.core.stage import operational
from stages.rl import sandbox
from stages.rl.protocols import Call, Result, Tool, ToolFailed
from stages.rl.sandbox import Limits, Outcome, Pool, Program, SandboxFailed

# Wall-clock seconds for each second of processor time: so many that on a busy machine too, a program that computes
# reaches its limit of processor time first.
WALL = Limits().wall_seconds / Limits().cpu_seconds
# Bytes of memory of a program.
MEMORY = 512 << 20
# {status of a program that was ended: the reason that the model is given}
ENDINGS = {
    "timeout": "the program was ended: it took too long",
    "memory": "the program was ended: it used too much memory",
    "output": "the program was ended: it printed too much",
    "killed": "the program was killed",
}


class PythonTool(Tool):
    """Python programs, which run in the sandbox."""

    description: ClassVar = "Runs a Python program and returns what it prints. Nothing is left for the next program."
    parameters: ClassVar = {"code": "the whole program; print what you need"}

    tool: Literal["python"]
    """selects this tool"""
    cpu_seconds: Annotated[int, Range(1, 3600)] = 4
    """processor time of a program, in seconds; its wall-clock limit is ten times as long"""
    workers: Annotated[int, Range(1, 4096)] | None = operational(None)
    """programs that run at once; null: two for each core"""

    def missing(self) -> str | None:
        reason = sandbox.missing()
        if reason is None:
            return None
        return f"the tool python runs what the model writes: {reason}"

    def open(self) -> Programs:
        limits = Limits(cpu_seconds=self.cpu_seconds, wall_seconds=WALL * self.cpu_seconds, memory_bytes=MEMORY)
        return Programs(Pool(self.workers, limits))


class Programs:
    """The running tool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def run(self, calls: Sequence[Call]) -> list[Result]:
        try:
            outcomes = self.pool.run([Program(call.arguments["code"]) for call in calls])
        except SandboxFailed as error:
            raise ToolFailed(f"tool python: {error}") from error
        return [describe(outcome) for outcome in outcomes]

    def close(self) -> None:
        self.pool.close()


def describe(outcome: Outcome) -> Result:
    """Returns what the program printed and, if it did not end well, a last line with the reason.

    Of an error this is the last line of its traceback, whose other lines show the sandbox.
    """
    if outcome.status == "ok":
        return Result("ok", outcome.stdout)

    error_lines = outcome.stderr.strip().splitlines() or [f"exit code {outcome.exit_code}"]
    reason = ENDINGS.get(outcome.status, error_lines[-1])
    line_break = "\n" if outcome.stdout and not outcome.stdout.endswith("\n") else ""
    return Result(outcome.status, f"{outcome.stdout}{line_break}{reason}")
