"""The decision about a Slurm job: rank 0 decides, and the job's script (batch.sh.jinja) acts on it.

The file `decision` of a launch has the decision in its first line, the kind of a failure in its second, and the outcome
of the attempt in the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import Failure, Kind
from pipeline.core.json_files import Damaged


class Decision(StrEnum):
    SEALED = "sealed"
    DONE = "done"
    """All stages of the run are sealed."""
    RESTART = "again"
    """The job gives its nodes back and is requeued."""
    RELAUNCH = "relaunch"
    """The ranks are launched again in the same allocation, as often as the profile allows; after that as RESTART."""
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """A decision and the outcome of the attempt. kind: of a failure."""

    decision: Decision
    text: str
    kind: Kind | None = None

    @classmethod
    def of(cls, decision: Decision, outcome: str | Failure) -> Verdict:
        """outcome: of the attempt, as a failure or in words."""
        if isinstance(outcome, Failure):
            return cls(decision, outcome.text, outcome.kind)
        return cls(decision, outcome)

    def write(self, launch: Path) -> None:
        """Writes the verdict to the folder of the launch, atomically, and to the log."""
        atomic_files.write(launch / "decision", f"{self.decision}\n{self.kind or ''}\n{self.text}\n")
        print(f"{self.decision}: {self.text}", flush=True)

    @classmethod
    def read(cls, launch: Path) -> Verdict | None:
        """The verdict of a launch; None if it does not exist yet, or if its file is damaged, which is reported."""
        path = launch / "decision"
        try:
            decision, kind, text = json_files.read_text(path).split("\n", 2)
            return cls(Decision(decision), text.rstrip("\n"), Kind(kind) if kind else None)
        except FileNotFoundError:
            return None
        except ValueError:
            json_files.report(Damaged(path, "it holds no decision"), "how that task ended is not known")
        except Damaged as error:
            json_files.report(error, "how that task ended is not known")
        return None
