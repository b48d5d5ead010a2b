"""Starts jobs on this machine from processes that have imported slow libraries once.

    launcher ─ socket ─ this process ─ fork ─ controller of a job ─ fork ─ rank 0, rank 1, …

A core imports torch and transformers in some five seconds, and a run has dozens of stages that need them. A stage names
them in `Stage.libraries`. This process imports them, and each job finds them in memory. Of this project it imports the
errors alone, so that each stage runs the code that its statement names.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core.errors import MachineError

# Seconds that a rank waits for the pickle of its job, which submitit puts in place after the start. submitit itself
# looks for it once a second.
PICKLE_SECONDS = 10.0
# Seconds for the answer to a request: the imports take some, and many more on a slow shared disk.
ANSWER_SECONDS = 600.0
# The name of a rank's process, before its number.
RANK_NAME = b"rank "


class Controller:
    """The process that has started the ranks of a job, with the methods of `Popen` that submitit calls."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start = self._state()[1]

    def poll(self) -> int | None:
        """Returns None while it runs. The outcome of a job is in its events."""
        state, start = self._state()
        # Nobody waits for the controller, so that another process may get its number.
        return 0 if state in b"ZX" or start != self._start else None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _state(self) -> tuple[bytes, bytes]:
        """Returns the state and the start time of the process; X if there is none."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return b"X", b""
        return fields[0], fields[19]


class JobStarter:
    """The launcher's side of a process that starts jobs. It begins with the first job.

    Args:
        command: Runs this Python with the variables of stages.
        libraries: Modules that the process imports first. One that is not installed is left to the stage, which says
            so.
    """

    def __init__(self, command: Sequence[str], libraries: Sequence[str]) -> None:
        self._command, self._libraries = command, libraries
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, folder: Path, variables: Mapping[str, str], ranks: int) -> Controller:
        """Starts a job.

        If it is interrupted, the process ends: the next job would read this one's answer. A job that was started
        unseen ends by itself, since its pickle never comes.

        Args:
            folder: submitit's folder of the job.
            variables: Further variables of its ranks, which Python does not see when it starts.
            ranks: The number of its processes.

        Raises:
            MachineError: The process is killed meanwhile, or does not answer.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._socket, far_end = socket.socketpair()
            with far_end:
                number = far_end.fileno()
                command = [*self._command, "-u", "-m", __spec__.name, str(number), *self._libraries]
                self._process = subprocess.Popen(command, pass_fds=[number])
        assert self._socket is not None
        request = json.dumps({"folder": str(folder), "variables": dict(variables), "ranks": ranks})
        pid = b""
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            with suppress(ConnectionError):
                self._socket.sendall(request.encode() + b"\n")
                pid = self._socket.recv(64)
        except TimeoutError:
            self.close()
            raise MachineError(
                f"the process that starts stages has not answered for {ANSWER_SECONDS:.0f} s, perhaps because a disk "
                "hangs; see to it, and run the command again"
            ) from None
        except BaseException:
            self.close()
            raise
        if not pid:
            raise MachineError("the process that starts stages was killed, perhaps for memory; run the command again")
        return Controller(int(pid))

    def close(self) -> None:
        """Ends the process. Jobs that run go on."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = self._socket = None


def serve(connection: socket.socket, libraries: Sequence[str]) -> None:
    """Starts jobs until the launcher closes the connection. Returns in each rank, too, after its job."""
    for name in ("submitit.core.submission", *libraries):
        with suppress(ImportError):  # the stage says what it lacks
            importlib.import_module(name)
    gc.freeze()  # garbage collections of the jobs pass over what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended controllers leave no zombies
    with connection, connection.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                break
            connection.sendall(str(pid).encode())
        else:
            return
    _control(Path(request["folder"]), request["variables"], request["ranks"])


def _control(folder: Path, variables: Mapping[str, str], ranks: int) -> None:
    """Starts the ranks of a job, passes SIGTERM on to them, and exits after the last. Returns in each rank."""
    job, pids = str(os.getpid()), list[int]()

    def pass_on(number: int, frame: Any) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A signal waits until all ranks are there to get it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, pass_on)
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            return _run_rank(folder, job, variables, rank)
        pids.append(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for pid in pids:
        os.waitpid(pid, 0)
    os._exit(0)


def _run_rank(folder: Path, job: str, variables: Mapping[str, str], rank: int) -> None:
    """Becomes a rank: its name, its variables, its log; and runs the pickled function of the job."""
    from submitit.core.submission import process_job
    from submitit.core.utils import JobPaths

    Path("/proc/self/comm").write_bytes(RANK_NAME + str(rank).encode())
    os.environ.update(variables)
    os.environ.update(SUBMITIT_LOCAL_JOB_ID=job, SUBMITIT_LOCAL_GLOBALID=str(rank), SUBMITIT_LOCAL_LOCALID=str(rank))
    paths = JobPaths(folder, job, rank)
    with paths.stdout.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    deadline = time.monotonic() + PICKLE_SECONDS
    while not paths.submitted_pickle.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process_job(folder)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
