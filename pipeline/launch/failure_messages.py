"""How an attempt that failed is told: one sentence, fit for a statement that is published."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path

from pipeline.core import os_errors
from pipeline.core.errors import AtomError, Failure, Interrupted, Kind
from pipeline.core.store import Store


def report_failure(error: BaseException, node: str, stage: str, store: Store) -> Failure:
    """Prints the sentence to the log, below the traceback if it is a bug; returns it with its kind."""
    failure = Failure(failure_message(error, stage, store), failure_kind(error, store))
    if failure.kind is Kind.BUG:
        traceback.print_exc()
    print(f"{node}: {failure.text}", file=sys.stderr, flush=True)
    return failure


def failure_kind(error: BaseException, store: Store) -> Kind:
    """What an exception of a stage is, for the exit code and for whether another attempt is made."""
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
    """What went wrong and what to do, as one sentence."""
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}); run the same command to go on"
    if fault := _fault(error, store):
        machine_message = f"stage {stage} failed by its machine or network ({error}); {os_errors.AGAIN}".replace(
            "\n", " "
        )
        return fault.text or machine_message
    if isinstance(error, AtomError):
        return str(error)
    if isinstance(error, ImportError) and _is_third_party(error):
        return f"stage {stage} needs {error.name}; install atom-release[data,train] and run the same command again"
    return f"a bug in stage {stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _fault(error: BaseException, store: Store) -> os_errors.Fault | None:
    """What the operating system means. An AtomError says itself what is wrong, unless a disk is behind it."""
    if isinstance(error, AtomError):
        return os_errors.device(error, store.home)
    return os_errors.find(error, store.home)


def _is_third_party(error: ImportError) -> bool:
    """Whether a package is missing that is not ours."""
    return (error.name or "").split(".")[0] not in ("pipeline", "stages", "release")


def disk_full_message(store: Store) -> str:
    return os_errors.FAULTS[errno.ENOSPC].text.format(place=store.home)


def strip_paths(text: str, home: Path) -> str:
    """A sentence as a statement may keep it: statements are published, and no folder of a machine belongs there."""
    text = re.sub(rf"{re.escape(str(home))}(?![\w-]|\.\w)", "$ATOM_HOME", text)
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)
