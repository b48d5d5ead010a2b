"""The process beside a run or a job that sends its metrics to MLflow, so that no server can hold up a stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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
