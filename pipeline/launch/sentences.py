"""How an attempt that failed is told: one sentence, fit for a statement that is published."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path

from pipeline import os_errors
from pipeline.errors import AtomError, Failure, Interrupted, Kind
from pipeline.store import Store

MACHINE = frozenset({
    errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE,
    errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EAGAIN, errno.EBUSY,
})  # fmt: skip
"""What the system says of a machine, not of our code: another attempt may meet another state, or another node."""


def tell(error: BaseException, node: str, stage: str, store: Store) -> Failure:
    """Prints the sentence to the log, below the traceback if it is a bug; returns it with its kind."""
    failure = Failure(sentence(error, stage, store), kind(error, store))
    if failure.kind is Kind.BUG:
        traceback.print_exc()
    print(f"{node}: {failure.text}", file=sys.stderr, flush=True)
    return failure


def kind(error: BaseException, store: Store) -> Kind:
    """What an exception of a stage is, for the exit code and for whether another attempt is made."""
    if isinstance(error, Interrupted):
        return Kind.STOPPED
    if os_errors.device(error, store.home):
        return Kind.MACHINE
    if isinstance(error, AtomError):
        return error.kind
    if os_errors.sentence(error, store.home):
        return Kind.MACHINE if isinstance(error, FileNotFoundError) else Kind.USER
    if isinstance(error, OSError) and error.errno in MACHINE:
        return Kind.MACHINE
    if isinstance(error, ImportError) and _foreign(error):
        return Kind.USER
    return Kind.BUG


def sentence(error: BaseException, stage: str, store: Store) -> str:
    """What went wrong and what to do, as one sentence."""
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}); run the same command to go on"
    if text := os_errors.device(error, store.home):
        return text
    if isinstance(error, AtomError):
        return str(error)
    if text := os_errors.sentence(error, store.home):
        return text
    if isinstance(error, ImportError) and _foreign(error):
        return f"stage {stage} needs {error.name}; install atom-release[data,train] and run the same command again"
    return f"a bug in stage {stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _foreign(error: ImportError) -> bool:
    """Whether a package is missing that is not ours."""
    return (error.name or "").split(".")[0] not in ("pipeline", "stages", "release")


def full(store: Store) -> str:
    return os_errors.DEVICES[errno.ENOSPC].format(place=store.home)


def without_places(text: str, home: Path) -> str:
    """A sentence as a statement may keep it: statements are published, and no folder of a machine belongs there."""
    text = text.replace(str(home), "$ATOM_HOME")
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)
