"""Errors of the operating system as one sentence: the place, the problem, the remedy.

A library may wrap the error; libraries in Rust have its number only in the text.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import Kind
from pipeline.core.json_files import printable

FULL_DISK_BYTES = 1_000_000
AGAIN = "run the same command to go on"
NAME = "{place} cannot be used ({why}); see that you may read and write it, and that nothing else is in its place"


@dataclass(frozen=True)
class Fault:
    """The meaning of an error of the operating system."""

    kind: Kind
    # The sentence, or NAME, or empty without a sentence of its own.
    text: str = ""


# A disk, a file server, or a limit of the machine, in any wrapper. AGAIN follows each sentence.
_MACHINE = {
    errno.ENOSPC: "the disk that holds {place} is full; free some space and ",
    errno.EDQUOT: "the quota for {place} is used up; free some space, or have it raised, and ",
    errno.EROFS: "{place} is on a file system that cannot be written now; have it mounted for writing, and ",
    errno.EIO: "the disk that holds {place} failed (input/output error); see the system's log, have it repaired, and ",
    errno.EMFILE: "this process may open no more files; raise the limit (ulimit -n), and ",
    errno.ENFILE: "this machine may open no more files; close other programs, and ",
}
# A file server or a device that does not answer.
_AWAY = "ESTALE ENODEV ENXIO ENOTCONN ETIMEDOUT EHOSTDOWN"
GONE = "the file server or the device of {place} is away; have it mounted again, and "
# An error in a name: a bug, unless the name is below $ATOM_HOME or from the command line.
_NAMES = "EACCES EPERM ENOTDIR EISDIR ELOOP ENAMETOOLONG ENOTEMPTY EEXIST ETXTBSY"
# The machine or its network: another attempt may succeed, or run on another node.
_CALLS = "ENOMEM EAGAIN EBUSY EPIPE EREMOTEIO ECONNREFUSED ECONNRESET EHOSTUNREACH ENETUNREACH"
# By number. Any other number is a bug of atom.
FAULTS = {
    **{number: Fault(Kind.MACHINE, text + AGAIN) for number, text in _MACHINE.items()},
    **{getattr(errno, name): Fault(Kind.MACHINE, GONE + AGAIN) for name in _AWAY.split()},
    errno.EMLINK: Fault(Kind.USER, "the file system of {place} takes no more hard links to a file; use another one"),
    errno.EXDEV: Fault(Kind.USER, "{place} lies on another file system than the rest of $ATOM_HOME, which must be one"),
    errno.ENOENT: Fault(Kind.MACHINE, NAME),
    **{getattr(errno, name): Fault(Kind.USER, NAME) for name in _NAMES.split()},
    **{getattr(errno, name): Fault(Kind.MACHINE) for name in _CALLS.split()},
}
# Errors that a network can cause as well: they have a sentence only if they name a file.
ON_A_PATH = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN})


def find(error: BaseException, home: Path, named_paths: Iterable[str] = ()) -> Fault | None:
    """Returns the fault of the operating system behind an error, with the whole sentence if there is one.

    Args:
        error: Any exception.
        home: $ATOM_HOME.
        named_paths: Further paths that the caller named: an unusable one is an error of the caller.

    Returns:
        None if no such fault is behind the error.
    """
    if device_fault := device(error, home):
        return device_fault
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or (fault := FAULTS.get(cause.errno or 0)) is None:
        return None
    if fault.text != NAME:
        return Fault(fault.kind) if cause is error else None

    # A name that is neither the caller's nor of the home: the code made it up, so the error is a bug.
    path = _path(cause)
    if path is None or not any(_on_one_line(path, place) for place in (str(home), *named_paths)):
        return None
    return Fault(fault.kind, NAME.format(place=printable(os.path.abspath(path)), why=os.strerror(cause.errno or 0)))


def device(error: BaseException, home: Path) -> Fault | None:
    """Returns the fault of a disk, a file server or a limit behind an error, in any wrapper; None for other errors."""
    cause: BaseException | None = error
    visited: set[int] = set()  # the chain of causes may be a circle
    while cause is not None and id(cause) not in visited:
        visited.add(id(cause))
        number, path = None, None
        if isinstance(cause, OSError):
            number, path = cause.errno, _path(cause)
        # Libraries in Rust have the number in their text alone.
        elif match := re.search(r"\(os error ([0-9]{1,3})\)", str(cause)):
            number = int(match[1])
        fault = FAULTS.get(number or 0, Fault(Kind.BUG))
        if fault.text not in ("", NAME) and (path is not None or number not in ON_A_PATH):
            return Fault(fault.kind, fault.text.format(place=printable(path or home)))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def full_disk(place: Path) -> str | None:
    """Returns the sentence about a full disk if the disk that holds a folder has less than a megabyte; else None."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:  # who needs the folder says what is wrong with it
        return None
    is_full = usage.total > 0 and usage.free < FULL_DISK_BYTES  # some file systems state no size
    return FAULTS[errno.ENOSPC].text.format(place=printable(place)) if is_full else None


def _on_one_line(path: str, place: str) -> bool:
    """Returns True if a path equals a place, is below it, or is a folder above it."""
    first, second = Path(os.path.abspath(path)), Path(os.path.abspath(place))
    return first.is_relative_to(second) or second.is_relative_to(first)


def _path(error: OSError) -> str | None:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else None
