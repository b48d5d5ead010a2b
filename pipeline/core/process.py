"""This process and its user: owners of files, permissions in a home folder that a group shares, garbage collection."""

from __future__ import annotations

import atexit
import gc
import os
import pwd
import stat
from functools import cache
from pathlib import Path


def owner_of(path: Path) -> str:
    """Returns the name of the user who owns a file, or the number of a user without a name. Raises OSError."""
    return user_name(path.stat().st_uid)


def current_user() -> str:
    """Returns the name of the user of this process."""
    return user_name(os.geteuid())


@cache
def user_name(uid: int) -> str:
    """Returns the name of a user, or the number of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def share_home(home: Path) -> None:
    """Lets the group write whatever this process and its children make, if a group shares the home folder.

    A group shares it if it may write the folder and the setgid bit of the folder is set. Changes the umask.
    """
    try:
        mode = home.stat().st_mode
    except OSError:  # it is not there yet, or its reader says what is wrong
        return
    if mode & stat.S_ISGID and mode & stat.S_IWGRP:
        # A umask can be read only by setting another one.
        os.umask(os.umask(0o077) & ~0o070)


# New objects after which the youngest are looked at; Python's own number is 700, or 2,000 from 3.13 on.
ALLOCATIONS = 20_000


def collect_rarely() -> None:
    """Makes Python look less often for objects that refer to each other in cycles. Call it before large imports.

    Memory of tensors does not wait for the collector, unless they are part of a cycle.
    """
    # PyTorch, Megatron and transformers leave half a million objects that never end. With Python's own numbers, the
    # collector walks over them again and again, for a fifth of the time of the imports.
    gc.set_threshold(ALLOCATIONS, 10, 10)
    # And once more when the process ends. So objects in cycles are not finalized then: files must be closed.
    atexit.register(gc.freeze)
