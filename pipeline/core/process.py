"""Processes: this one and its user, and the one beside it that sends metrics to MLflow.

Of this one: owners of files, permissions in a home folder that a group shares, garbage collection.
"""

from __future__ import annotations

import atexit
import gc
import os
import pwd
import signal
import stat
import subprocess
import sys
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


# The MLFLOW_TRACKING_URI with which nothing is sent.
NO_TRACKING = "none"
# The signals with which a terminal and Slurm end a run.
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}


class Companion:
    """Runs `pipeline.tracking.mlflow_sync` in a process of its own, whose errors never affect the run.

    Args:
        home: The home.
        run: The id of the run.
        whole: True if the run ends with this process, as with `atom run`. Beside a Slurm job, only a server gets
            anything: many hosts cannot write one file of SQLite on a shared file system.
    """

    # Seconds in which the process may send the rest: usually, and while idle nodes wait for it.
    LAST_CHANCE = 60.0
    QUICK = 2.0

    def __init__(self, home: Path, run: str, whole: bool) -> None:
        self.run = run
        self.process: subprocess.Popen[str] | None = None
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if uri == NO_TRACKING or not (whole or uri.startswith(("http:", "https:"))):
            return
        # A terminal and Slurm signal all processes. The new one inherits this mask, and ends when its input ends.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            command = [sys.executable, "-m", "pipeline.tracking.mlflow_sync", str(home), run, "whole" if whole else ""]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def close(self, over: bool, quick: bool = False) -> None:
        """Lets the process send the rest.

        Args:
            over: True if the run has ended, and not only this job of it.
            quick: True if idle nodes stay allocated meanwhile, so that there is little time.
        """
        if self.process is None:
            return
        seconds = self.QUICK if quick else self.LAST_CHANCE
        try:
            self.process.communicate("over" if over else "", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            print(
                f"MLflow did not accept everything (no answer within {seconds:.0f} seconds); `atom sync {self.run}` "
                "sends it later",
                flush=True,
            )

    def kill(self) -> None:
        """Ends the process at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
