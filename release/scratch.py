"""Temporary folders for downloads from the Hub and for replays; the next process removes those of killed ones.

A folder belongs to a process while the process holds a lock on it, which the kernel releases with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import MachineError

PREFIX = "atom-scratch-"
"""The beginning of the names of the folders."""


@contextmanager
def folder() -> Iterator[Path]:
    """Gives a new folder in TMPDIR, and removes it at the end.

    Before, it removes the folders of this user's exited processes.

    Raises MachineError if no folder can be made or locked there.
    """
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    path, lock = _make_locked_folder(parent)
    try:
        yield path
    finally:
        # The lock is still held, so no other process sweeps the folder at the same time.
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path) -> list[Path]:
    """Removes the folders of this user's exited processes, and returns them."""
    removed = []
    for path in sorted(parent.glob(f"{PREFIX}*")):
        with suppress(OSError):  # its process lives, another process sweeps it at the same time, or it is unreadable
            status = path.lstat()
            if status.st_uid != os.geteuid() or path.is_symlink() or not path.is_dir():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # Fails while the process of the folder lives.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
            finally:
                os.close(lock)
    return removed


def _make_locked_folder(parent: Path) -> tuple[Path, int]:
    """Returns a new folder, and the descriptor that holds its lock. Raises MachineError."""
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise _unusable(parent, error) from None
        lock = None
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Fails if another process swept the folder before it was locked.
            path.lstat()
            return path, lock
        except OSError as error:
            if lock is not None:
                os.close(lock)
            # Another process sweeps the folder, or has swept it.
            if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
                continue
            shutil.rmtree(path, ignore_errors=True)
            raise _unusable(parent, error) from None


def _unusable(parent: Path, error: OSError) -> MachineError:
    return MachineError(
        f"no temporary folder can be made and locked in {parent}: {error.strerror}; set TMPDIR to another file system"
    )
