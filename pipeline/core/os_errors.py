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
from functools import partial
from pathlib import Path

from pipeline.core.errors import Kind
from pipeline.core.json_files import printable

FULL_DISK_BYTES = 1_000_000
AGAIN = "run the same command to go on"
UNUSABLE = "{place} cannot be used ({why}); "
NAME = UNUSABLE + "name a file that you may read, or a folder that you may write"
HOME = (
    UNUSABLE + "let yourself read and write it, or set ATOM_HOME to a folder that you may write, with everything in it"
)


@dataclass(frozen=True)
class Fault:
    """The meaning of an error of the operating system. text: the sentence, or NAME, or empty without a sentence of its
    own."""

    kind: Kind
    text: str = ""


_machine, _user = partial(Fault, Kind.MACHINE), partial(Fault, Kind.USER)
_NAMES = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY,
    errno.EEXIST, errno.ETXTBSY,
)  # fmt: skip
_CALLS = (
    errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EPIPE, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTUNREACH, errno.ENETUNREACH,
)  # fmt: skip
_DEVICE_GONE = "the device that holds {place} is gone; have it mounted again, and " + AGAIN
# By number. Any other number is a bug of atom.
FAULTS = {
    # A disk, a file server, or a limit of the machine, in any wrapper.
    errno.ENOSPC: _machine("the disk that holds {place} is full; free some space and " + AGAIN),
    errno.EDQUOT: _machine("the quota for {place} is used up; free some space, or have it raised, and " + AGAIN),
    errno.EROFS: _machine(
        "{place} is on a file system that cannot be written now; have it mounted for writing, and " + AGAIN
    ),
    errno.EIO: _machine(
        "the disk that holds {place} failed (input/output error); see the system's log, have it repaired, and " + AGAIN
    ),
    errno.ESTALE: _machine(
        "{place} was taken away by its file server (stale file handle); have it mounted again, and " + AGAIN
    ),
    errno.ENODEV: _machine(_DEVICE_GONE),
    errno.ENXIO: _machine(_DEVICE_GONE),
    errno.ENOTCONN: _machine("the file server of {place} is not connected; have it mounted again, and " + AGAIN),
    errno.ETIMEDOUT: _machine("the file server of {place} gave no answer; see whether it is up, and " + AGAIN),
    errno.EHOSTDOWN: _machine("the file server of {place} is down; wait until it is up, and " + AGAIN),
    errno.EMFILE: _machine("this process may open no more files; raise the limit (ulimit -n), and " + AGAIN),
    errno.ENFILE: _machine("this machine may open no more files; close other programs, and " + AGAIN),
    errno.ENOLCK: _machine("the file system of {place} has no locks left; see its server, and " + AGAIN),
    errno.EMLINK: _user("the file system of {place} takes no more hard links to a file; use another one"),
    errno.EXDEV: _user("{place} lies on another file system than the rest of $ATOM_HOME, which must be one"),
    # An error in a name: a bug, unless the name is below $ATOM_HOME or from the command line.
    errno.ENOENT: _machine(NAME),
    **dict.fromkeys(_NAMES, _user(NAME)),
    # The machine or its network: another attempt may succeed, or run on another node.
    **dict.fromkeys(_CALLS, _machine()),
}
# Errors that a network can cause as well: they have a sentence only if they name a file.
ON_A_PATH = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN})


def find(error: BaseException, home: Path, named_paths: Iterable[str] = ()) -> Fault | None:
    """The fault of the operating system behind an error, with the whole sentence if there is one; None without such a
    fault.

    named_paths: paths that the caller named, beside `home`: an unusable one is an error of the caller.
    """
    if device_fault := device(error, home):
        return device_fault
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or (fault := FAULTS.get(cause.errno or 0)) is None:
        return None
    if fault.text != NAME:
        return Fault(fault.kind) if cause is error else None
    path, named_paths = _path(cause), list(named_paths)
    if path is None or not any(_on_one_line(path, place) for place in (str(home), *named_paths)):
        return None
    if cause.errno == errno.ENOENT and _on_one_line(path, str(home)) and not home.exists():
        return Fault(
            fault.kind,
            f"{printable(home)} cannot be used (it is not there); have it mounted, or set ATOM_HOME to another folder",
        )
    return Fault(
        fault.kind, _advice(Path(os.path.abspath(path)), cause.errno or 0, Path(os.path.abspath(home)), named_paths)
    )


def _advice(path: Path, number: int, home: Path, named_paths: Iterable[str]) -> str:
    """The sentence for a path of the home, or for a named path."""
    fields = {"place": printable(path), "why": os.strerror(number)}
    if str(path) in map(os.path.abspath, named_paths) or not _on_one_line(str(path), str(home)):
        return NAME.format(**fields)
    folders = [place for place in reversed(path.parents) if home in place.parents]
    if number in (errno.EEXIST, errno.ENOTDIR) and home in path.parents:  # a folder is expected there
        folders.append(path)
    if obstacle := next(filter(None, map(misplaced_file, folders)), None):
        return f"{obstacle}, and {AGAIN}"
    if home not in path.parents or number in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        return HOME.format(**fields)
    remedy = "see what removed it" if number == errno.ENOENT else "move it away"
    return f"{UNUSABLE.format(**fields)}{remedy}, and {AGAIN}"


def misplaced_file(path: Path) -> str | None:
    """The remedy for a file in the place of a folder; None if the path is a folder or missing."""
    if os.path.isdir(path) or not os.path.lexists(path):
        return None
    if path.is_symlink():
        return f"{printable(path)} is a link that leads to no folder; have its disk mounted, or move it away"
    return f"{printable(path)} is no folder; move it away"


def device(error: BaseException, home: Path) -> Fault | None:
    """The fault of a disk, a file server or a limit behind an error, in any wrapper; None for other errors."""
    cause: BaseException | None = error
    visited: set[int] = set()
    while cause is not None and id(cause) not in visited:
        visited.add(id(cause))
        number, path = None, None
        if isinstance(cause, OSError):
            number, path = cause.errno, _path(cause)
        elif match := re.search(r"\(os error ([0-9]{1,3})\)", str(cause)):
            number = int(match[1])
        fault = FAULTS.get(number or 0, Fault(Kind.BUG))
        if fault.text not in ("", NAME) and (path is not None or number not in ON_A_PATH):
            return Fault(fault.kind, fault.text.format(place=printable(path or home)))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def full_disk(place: Path) -> str | None:
    """The sentence about a full disk if the disk that holds a folder has less than a megabyte; else None."""
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
