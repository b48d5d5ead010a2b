"""Errors by kind: the kind decides the exit code, and whether another attempt is made.

The command line prints an AtomError as one sentence. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """The kind of an error. It is recorded with the sentence of every outcome; older files have none."""

    # A recipe, a profile, the data or the command line: the same attempt fails again.
    USER = "user"
    # A check failed: the same attempt fails again.
    CHECK = "check"
    # A node, a disk, the network, another rank: another attempt may succeed.
    MACHINE = "machine"
    # A signal stopped the attempt: another attempt resumes.
    STOPPED = "stopped"
    # The stage asks for a new start of its ranks, on other nodes if there are several.
    RESTART = "restart"
    # An unexpected exception: one more attempt shows whether it repeats.
    BUG = "bug"

    @property
    def exit_code(self) -> int:
        return 1 if self is Kind.CHECK else 2

    @property
    def final(self) -> bool:
        """True if another attempt would fail in the same way, so that none is made."""
        return self in (Kind.USER, Kind.CHECK)

    @property
    def orderly(self) -> bool:
        """True if all ranks end at one point by themselves, so that none has to be told."""
        return self in ORDERLY


ORDERLY = (Kind.STOPPED, Kind.RESTART)
"""Kinds that are no failures: all ranks end at one point by themselves, and another start goes on."""


@dataclass(frozen=True)
class Failure:
    """The failure of an attempt, as recorded in its statement, its events and the job's decision."""

    text: str
    kind: Kind = Kind.MACHINE
    # The node of the cluster whose fault it is; empty if it is no node's.
    bad_node: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, text: str, kind: str | None, bad_node: str = "") -> Failure:
        """Reads a failure from a file. An unknown kind is taken for that of a machine, and tried again."""
        return cls(text, Kind(kind) if kind in list(Kind) else Kind.MACHINE, bad_node)


class AtomError(Exception):
    """An error of the caller in one sentence: the problem, the place, the remedy. Exit code 2."""

    kind = Kind.USER

    @property
    def exit_code(self) -> int:
        return self.kind.exit_code


class RecipeError(AtomError):
    """A recipe or data recipe that cannot be run."""


class MissingData(RecipeError):
    """Data that a recipe needs is not on this machine."""


class CheckFailed(AtomError):
    """A failed check: a gate of the release, or bytes that differ from their manifest. Exit code 1."""

    kind = Kind.CHECK


class MachineError(AtomError):
    """An error of the machine that may be gone at the next attempt: a disk, a server, another process."""

    kind = Kind.MACHINE


class Restart(AtomError):
    """No error: all ranks of the stage end at one point, to be started again."""

    kind = Kind.RESTART


class PeerLost(MachineError):
    """A rank lost its connection to another rank, whose own error is the cause."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the job (SIGINT, SIGTERM, SIGUSR1, SIGUSR2). Not an Exception, so that no stage swallows it."""


def of_kind(failure: Failure, text: str) -> AtomError:
    """Returns the error of a command that waited for an attempt which failed."""
    error = CheckFailed(text) if failure.kind is Kind.CHECK else AtomError(text)
    error.kind = failure.kind
    return error


def installing(extra: str) -> str:
    """Returns the advice to install an extra of this package, which is on no index."""
    return f"run pip install '.[{extra}]' in the checkout or in code/ of a release"
