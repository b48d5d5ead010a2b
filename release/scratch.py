"""Temporary folders for what is pulled from the Hub or trained again; those of killed processes are swept by the next.

A folder belongs to a process for as long as that holds a lock on it, which the kernel lets go with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "atom-scratch-"


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder in TMPDIR, removed at the end. Sweeps those whose process is gone."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    path, lock = _locked(place)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(place: Path) -> list[Path]:
    """Removes the folders of this user's processes that are no more, and returns them."""
    gone = []
    for path in sorted(place.glob(f"{PREFIX}*")):
        with suppress(OSError):  # another process sweeps it at the same time, or it is not ours
            status = path.lstat()
            if status.st_uid != os.geteuid() or path.is_symlink() or not path.is_dir():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                gone.append(path)
            finally:
                os.close(lock)
    return gone


def _locked(place: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        with suppress(OSError):  # another process swept it before it was locked: once more
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.lstat()
                return path, lock
            except OSError:
                os.close(lock)
                raise
