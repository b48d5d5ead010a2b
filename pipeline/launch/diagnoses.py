"""Sentences about failures and waiting jobs: how each is recognized, and what a person can do.

`failures.yaml` is the table of failures. The same sentence reaches the log, the decision of the launch, `atom status`
and the alert: a rank writes it (`report_failure`), or the job's script (post_mortem.sh.jinja), or `atom status` for a
job whose script never ran. MLflow gets what a rank writes. Faults of the operating system have their own table
(os_errors.py), by number.

`waiting_reasons.yaml` is the table of reasons for which a job waits. `squeue` shows either a name of Slurm's list
(`job_state_reason_string`; job_reason_codes in Slurm's documentation) or a text of the controller. A reason that is in
neither has the sentence of `UNKNOWN`, so no sentence is about another reason.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import os_errors
from pipeline.core.environment import node_name
from pipeline.core.errors import AtomError, Failure, Interrupted, Kind, installing
from pipeline.core.store import Store
from pipeline.core.yaml_text import read_trusted
from pipeline.launch.slurm_client import Job

# The exit code on a node without the run's files: EX_UNAVAILABLE of sysexits.h.
NO_HOME_CODE = 69


def _table(name: str) -> dict[str, dict[str, Any]]:
    """Reads a table that lies beside this module."""
    table: dict[str, dict[str, Any]] = read_trusted(Path(__file__).with_name(name))
    return table


@dataclass(frozen=True)
class Diagnosis:
    """One row of failures.yaml, which explains the fields."""

    name: str
    signs: str
    kind: Kind
    sentence: str
    states: tuple[str, ...] = ()
    code: str = ""
    pattern: str = ""
    bad_node: bool = False
    attempt: str = ""

    def text(self, **fields: str) -> str:
        """Returns the sentence with its fields filled in. A field that is not known is said to be unknown."""
        return self.sentence.format_map(_Fields(fields))


class _Fields(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return {"nodes": "an unknown node", "user": "somebody", "job": "of it"}.get(name, "not known")


def _diagnosis(row: dict[str, Any]) -> Diagnosis:
    lists = {"states": tuple(row.get("states", ())), "pattern": "|".join(row.get("pattern", ()))}
    return Diagnosis(**{**row, **lists, "kind": Kind(row["kind"])})


# By the names that the job's script has for them.
FAILURES = {name: _diagnosis(row) for name, row in _table("failures.yaml").items()}


def of_job(state: str, code: str) -> Diagnosis | None:
    """Returns the diagnosis of an ended job that left no outcome.

    Args:
        state: Final state of the job, by Slurm's accounting.
        code: Its exit code and signal, likewise.
    """
    by_code = [row for row in FAILURES.values() if row.code and row.code == code]
    by_state = [row for row in FAILURES.values() if state in row.states]
    return next(iter(by_code + by_state), None)


def of_error(error: BaseException) -> tuple[Diagnosis, str] | None:
    """Returns the diagnosis of a rank's exception, with the line of its message that shows it; None without one.

    The messages of its causes count as well. Only a RuntimeError counts, as PyTorch and NCCL raise it: other text may
    quote anything.
    """
    cause: BaseException | None = error
    # The chain of causes may be a circle.
    for _ in range(10):
        if cause is None:
            return None
        if isinstance(cause, RuntimeError):
            for line in str(cause).splitlines():
                if re.search(FAILURES["device"].pattern, line):
                    return FAILURES["device"], line.strip()[:300]
        cause = cause.__cause__ or cause.__context__
    return None


def report_failure(error: BaseException, node: str, stage: str, store: Store) -> Failure:
    """Prints the sentence to the log, below the traceback of a bug; returns it with its kind."""
    failure = Failure(failure_message(error, stage, store), failure_kind(error, store))
    if device := of_error(error):
        diagnosis, line = device
        failure = Failure(diagnosis.text(nodes=node_name(), detail=line), diagnosis.kind, bad_node=node_name())
    elif failure.kind is Kind.MACHINE and "SLURMD_NODENAME" in os.environ:
        # a disk or a route may be the node's alone
        failure = Failure(f"node {node_name()}: {failure.text}", failure.kind)
    if failure.kind is Kind.BUG:
        traceback.print_exc()
    print(f"{node}: {failure.text}", file=sys.stderr, flush=True)
    return failure


def failure_kind(error: BaseException, store: Store) -> Kind:
    """Returns the kind of a stage's exception, which decides the exit code and whether another attempt is made."""
    if isinstance(error, Interrupted):
        return Kind.STOPPED
    if fault := _fault(error, store):
        return fault.kind
    if isinstance(error, AtomError):
        return error.kind
    if isinstance(error, ImportError) and _is_third_party(error):
        return Kind.USER
    return Kind.BUG


def failure_message(error: BaseException, stage: str, store: Store) -> str:
    """Returns the problem and the remedy as one sentence."""
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}); run the same command to go on"
    if fault := _fault(error, store):
        message = f"stage {stage} failed by its machine or network ({error}); {os_errors.AGAIN}"
        return fault.text or message.replace("\n", " ")
    if isinstance(error, AtomError):
        return str(error)
    if isinstance(error, ImportError) and _is_third_party(error):
        return f"stage {stage} needs {error.name}; {installing('data,train')}, and the same command again"
    return f"a bug in stage {stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _fault(error: BaseException, store: Store) -> os_errors.Fault | None:
    """Returns the fault of the operating system. An AtomError has its own sentence, unless a disk caused it."""
    if isinstance(error, AtomError):
        return os_errors.device(error, store.home)
    return os_errors.find(error, store.home)


def _is_third_party(error: ImportError) -> bool:
    """Returns True if a third-party package is missing."""
    return (error.name or "").split(".")[0] not in ("pipeline", "stages", "release")


def strip_paths(text: str, home: Path) -> str:
    """Removes the folders of a machine from a sentence, because statements are published."""
    text = re.sub(rf"{re.escape(str(home))}(?![\w-]|\.\w)", "$ATOM_HOME", text)
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)


# The states of a job in which the reason says why it waits.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True)
class WaitingReason:
    """One row of waiting_reasons.yaml, which explains the fields.

    `reasons` is one regular expression for all of them.
    """

    name: str
    reasons: str
    sentence: str
    alert: bool = False

    def fits(self, reason: str) -> bool:
        """Returns True if the row is that of a reason as Slurm shows it."""
        return re.fullmatch(self.reasons, reason) is not None


_RESOURCE = "(BB|Billing|Cpu|CPU|Energy|GRES|License|Mem|Memory|Node|Unknown)"
WAITING_REASONS = tuple(
    WaitingReason(
        name, "|".join(row["reasons"]).replace("RESOURCE", _RESOURCE), row["sentence"], row.get("alert", False)
    )
    for name, row in _table("waiting_reasons.yaml").items()
)
UNKNOWN = WaitingReason("unknown", "", "Slurm names a reason that atom does not know; see `scontrol show job {job}`")


def explain(job: Job) -> tuple[WaitingReason, str] | None:
    """Returns the row and the sentence about a waiting job; None for another job, or if Slurm names no reason."""
    if job.state not in WAITING or not job.reason:
        return None
    row = next((row for row in WAITING_REASONS if row.fits(job.reason)), UNKNOWN)
    sentence = row.sentence.format(job=job.id, partition=job.partition)
    return row, f"{sentence} ({job.reason})"
