"""Failure messages: one sentence, without paths, fit for a published statement."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path

from pipeline.core import os_errors
from pipeline.core.environment import node_name
from pipeline.core.errors import AtomError, Failure, Interrupted, Kind, installing
from pipeline.core.progress import duration
from pipeline.core.store import Store
from pipeline.launch import diagnoses


def report_failure(error: BaseException, node: str, stage: str, store: Store) -> Failure:
    """Prints the sentence to the log, below the traceback of a bug; returns it with its kind."""
    failure = Failure(failure_message(error, stage, store), failure_kind(error, store))
    if device := diagnoses.of_error(error):
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
    """The kind of a stage's exception, which decides the exit code and whether another attempt is made."""
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
    """The problem and the remedy as one sentence."""
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}{_before_limit(str(error))}); run the same command to go on"
    if fault := _fault(error, store):
        machine_message = f"stage {stage} failed by its machine or network ({error}); {os_errors.AGAIN}".replace(
            "\n", " "
        )
        return fault.text or machine_message
    if isinstance(error, AtomError):
        return str(error)
    if isinstance(error, ImportError) and _is_third_party(error):
        return f"stage {stage} needs {error.name}; {installing('data,train')}, and the same command again"
    return f"a bug in stage {stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _before_limit(signal_name: str) -> str:
    """How long before the time limit of its Slurm job a stage was signaled to save. Slurm does so shortly before the
    limit, and for a preemption."""
    start, end = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    if signal_name != "SIGUSR2" or not (start.isdigit() and end.isdigit()):
        return ""
    return f", {duration(max(0.0, int(end) - time.time()))} before its time limit of {duration(int(end) - int(start))}"


def _fault(error: BaseException, store: Store) -> os_errors.Fault | None:
    """The fault of the operating system. An AtomError has its own sentence, unless a disk caused it."""
    if isinstance(error, AtomError):
        return os_errors.device(error, store.home)
    return os_errors.find(error, store.home)


def _is_third_party(error: ImportError) -> bool:
    """Whether a third-party package is missing."""
    return (error.name or "").split(".")[0] not in ("pipeline", "stages", "release")


def strip_paths(text: str, home: Path) -> str:
    """Removes the folders of a machine from a sentence, because statements are published."""
    text = re.sub(rf"{re.escape(str(home))}(?![\w-]|\.\w)", "$ATOM_HOME", text)
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)
