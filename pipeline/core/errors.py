"""How a run may end badly, by kind: the kind decides the exit code, and whether another attempt makes sense.

The command line prints an AtomError as one sentence. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What an error is. It is written beside every sentence of an outcome; older files have none."""

    USER = "user"
    """A recipe, a profile, the data or the command line: the same attempt fails again."""
    CHECK = "check"
    """The checked thing is bad: the same attempt fails again."""
    MACHINE = "machine"
    """A node, a disk, the network, another rank: another attempt may succeed."""
    STOPPED = "stopped"
    """A signal asked for the end: another attempt goes on from there."""
    BUG = "bug"
    """An exception that nobody expected: one more attempt tells whether it comes again."""

    @property
    def exit_code(self) -> int:
        return 1 if self is Kind.CHECK else 2

    @property
    def final(self) -> bool:
        """Whether the same attempt fails again, so that none is made."""
        return self in (Kind.USER, Kind.CHECK)


@dataclass(frozen=True)
class Failure:
    """How an attempt failed, as its statement, its events and the job's decision keep it."""

    text: str
    kind: Kind = Kind.MACHINE

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, text: str, kind: str | None) -> Failure:
        """A failure as a file has it; files of before kinds existed have None, which is retried as it was then."""
        return cls(text, Kind(kind) if kind in list(Kind) else Kind.MACHINE)


class AtomError(Exception):
    """The caller's mistake, told in one sentence: what, where, what to do. Exit code 2."""

    kind = Kind.USER

    @property
    def exit_code(self) -> int:
        return self.kind.exit_code


class RecipeError(AtomError):
    """A recipe (or data recipe) that cannot be run as it stands."""


class CheckFailed(AtomError):
    """The checked thing is bad: a gate of the release, or a byte that is not what its manifest says. Exit code 1."""

    kind = Kind.CHECK


class MachineError(AtomError):
    """The machine's state, which may be another one at the next attempt: a disk, a server, another process."""

    kind = Kind.MACHINE


class PeerLost(MachineError):
    """A rank lost touch with another one, which knows better why."""


class Interrupted(KeyboardInterrupt):
    """The job was asked to stop (SIGINT, SIGTERM, SIGUSR1, SIGUSR2). Not an Exception, so that no stage swallows it."""


def of_kind(failure: Failure, text: str) -> AtomError:
    """The error with which a command that waited for an attempt ends."""
    error = CheckFailed(text) if failure.kind is Kind.CHECK else AtomError(text)
    error.kind = failure.kind
    return error
