"""What a sandbox runs, what it may use, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from pipeline.core.errors import MachineError

PATIENCE = 60.0  # seconds in which our own processes start or answer, on however busy a machine


Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]


DEATHS = (BrokenPipeError, ConnectionResetError)
"""Raised where a sandbox died while it ran a program: it was killed from outside, or the program did it."""


class Job(TypedDict):
    """What a child in a sandbox runs: a whole program; or an answer's functions, which it calls as it is asked; or a
    check that calls them. prelude: source that goes before; entry_point: the name of the function. A program has
    neither."""

    role: Literal["program", "answer", "check"]
    source: str
    stdin: str
    prelude: NotRequired[str]
    entry_point: NotRequired[str]


class SandboxFailed(MachineError):
    """The sandbox itself did not do its work; nothing is known of the program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    cpu_seconds bound each process and decide; wall_seconds are far above, so that a busy machine fails no good
    program, and end what sleeps. memory_bytes: address space of each process, and, under root, memory of all together.
    disk_bytes: of /tmp. output_bytes: of standard output, of standard error, and of each message, apart."""

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
    """exit_code: negative if a signal ended it. cpu_seconds: of its first process and those that this waited for."""

    status: Status
    stdout: str
    stderr: str
    exit_code: int
    cpu_seconds: float
