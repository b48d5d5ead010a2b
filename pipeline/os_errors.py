"""What the operating system refuses, as one sentence: which place, what is wrong with it, what to do.

An error may come wrapped by whatever library met it; Rust's libraries say its number in the text alone.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from pipeline.json_files import printable

AGAIN = "run the same command to go on"
DEVICES = {
    errno.ENOSPC: "the disk that holds {place} is full; free some space and " + AGAIN,
    errno.EDQUOT: "the quota for {place} is used up; free some space, or have it raised, and " + AGAIN,
    errno.EROFS: "{place} is on a file system that cannot be written now; have it mounted for writing, and " + AGAIN,
    errno.EIO: "the disk that holds {place} failed (input/output error); see the system's log, have it repaired, and "
    + AGAIN,
    errno.ESTALE: "{place} was taken away by its file server (stale file handle); have it mounted again, and " + AGAIN,
    errno.ENODEV: "the device that holds {place} is gone; have it mounted again, and " + AGAIN,
    errno.ENXIO: "the device that holds {place} is gone; have it mounted again, and " + AGAIN,
    errno.ENOTCONN: "the file server of {place} is not connected; have it mounted again, and " + AGAIN,
    errno.ETIMEDOUT: "the file server of {place} gave no answer; see whether it is up, and " + AGAIN,
    errno.EHOSTDOWN: "the file server of {place} is down; wait until it is up, and " + AGAIN,
    errno.EMFILE: "this process may open no more files; raise the limit (ulimit -n), and " + AGAIN,
    errno.ENFILE: "this machine may open no more files; close other programs, and " + AGAIN,
    errno.EMLINK: "the file system of {place} takes no more hard links to a file; use another one",
    errno.EXDEV: "{place} lies on another file system than the rest of $ATOM_HOME, which must be one",
    errno.ENOLCK: "the file system of {place} has no locks left; see its server, and " + AGAIN,
}
"""What a machine or a file server may do at any time, whoever is told of it."""
NAMES = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOTEMPTY, errno.EEXIST, errno.ETXTBSY, errno.EBUSY,
)  # fmt: skip
"""What is wrong with a name; below $ATOM_HOME it is no bug of a stage."""


ON_A_PATH = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN})
"""Of the devices' errors, those that a network causes, too: they count only where they name a file."""


def sentence(error: BaseException, home: Path, names_anywhere: bool = False) -> str | None:
    """The sentence for an error that the operating system caused, directly or not; None for any other.

    names_anywhere: whether a name that cannot be used is the caller's mistake wherever it lies, not only below `home`.
    """
    if text := device(error, home):
        return text
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno not in NAMES or (path := _path(cause)) is None:
        return None
    below = os.path.abspath(path).startswith(str(home))
    if not below and not names_anywhere:
        return None
    if cause.errno == errno.ENOENT and below and not home.exists():
        return f"{printable(home)} cannot be used (it is not there); have it mounted, or set ATOM_HOME anew"
    return (
        f"{printable(path)} cannot be used ({os.strerror(cause.errno)}); name a file that you may read, and set "
        "ATOM_HOME to a folder that you may write, with everything in it"
    )


def device(error: BaseException, home: Path) -> str | None:
    """The sentence where a disk, a file server or a limit is behind an error, in whatever it was wrapped."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        number, path = None, None
        if isinstance(cause, OSError):
            number, path = cause.errno, _path(cause)
        elif match := re.search(r"\(os error ([0-9]{1,3})\)", str(cause)):
            number = int(match[1])
        if number in DEVICES and (path is not None or number not in ON_A_PATH):
            return DEVICES[number].format(place=printable(path or home))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _path(error: OSError) -> str | None:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else None
