"""The users of a home folder that a group shares: who owns a file, and permissions for the group."""

from __future__ import annotations

import os
import pwd
import stat
from functools import cache
from pathlib import Path


def owner(path: Path) -> str:
    """The name of the user who owns a file, or the number of a user without a name. Raises OSError."""
    return name(path.stat().st_uid)


def present() -> str:
    """The name of the user of this process."""
    return name(os.geteuid())


@cache
def name(uid: int) -> str:
    """The name of a user, or the number of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def share(home: Path) -> None:
    """Lets the group write whatever this process and its children make, if the home folder is one of a group: the
    group may write it, and its setgid bit is set. Sets the umask."""
    try:
        mode = home.stat().st_mode
    except OSError:  # it is not there yet, or its reader says what is wrong
        return
    if mode & stat.S_ISGID and mode & stat.S_IWGRP:
        os.umask(os.umask(0o077) & ~0o070)
