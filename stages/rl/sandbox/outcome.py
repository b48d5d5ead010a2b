"""The job of a sandbox, its limits, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from pipeline.core.errors import MachineError

PATIENCE = 60.0  # seconds in which this project's processes start or answer, also on a busy machine


Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]


# The exceptions when a sandbox died while it ran a program: it was killed from outside, or by the program.
DEATHS = (BrokenPipeError, ConnectionResetError)


class Job(TypedDict):
    """The job of a child in a sandbox.

    Attributes:
        role: A whole program; or an answer's functions, which it calls on request; or a check that calls them.
        source: Its source.
        stdin: Its standard input.
        prelude: Source that runs before; a program has none.
        entry_point: The name of the function.
    """

    role: Literal["program", "answer", "check"]
    source: str
    stdin: str
    prelude: NotRequired[str]
    entry_point: NotRequired[str]


class SandboxFailed(MachineError):
    """The sandbox itself failed; the result of the program is unknown."""


@dataclass(frozen=True)
class Limits:
    """The limits of a program.

    cpu_seconds bound each process and are the effective limit; wall_seconds are far above, so that no good program
    fails on a busy machine, and end sleeping programs.

    Attributes:
        cpu_seconds: Processor time of each process.
        wall_seconds: Time of the clock for the program.
        memory_bytes: Address space of each process, and, under root, memory of all together.
        disk_bytes: Size of /tmp.
        file_bytes: Size of one file.
        processes: Number of processes and threads.
        open_files: Open descriptors of one process.
        output_bytes: Size of standard output, of standard error, and of each message, separately.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 40.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    file_bytes: int = 16 << 20
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Outcome:
    """The end of a program.

    Attributes:
        status: How it ended.
        stdout: Its standard output.
        stderr: Its standard error.
        exit_code: Its exit code; negative if a signal ended it.
        cpu_seconds: Time of its first process and those that this waited for.
    """

    status: Status
    stdout: str
    stderr: str
    exit_code: int
    cpu_seconds: float
