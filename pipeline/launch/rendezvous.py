"""The rendezvous of the ranks of one stage: rank 0 does the work of the worker, the others follow it.

A launch is one start of the ranks of a job. They exchange messages through a folder of that launch, so no message is
stale: `logs/<run>/<node>/ranks/<job>.<restarts>/`, or `<job>.<restarts>.<relaunches>/` for ranks that start again in
the same allocation, with

    rank-<rank>.json    the process of a rank
    meeting.json        the decision of rank 0: an address, that it is not ready yet (and whether it checks the inputs),
                        or that no rank is needed
    end-<rank>.json     the outcome and usage of another rank
    failures.jsonl      one line for each failing rank; the first one counts. Rank 0 adds `over` when it has
                        written everything
    decision            the decision of rank 0 about the Slurm job, which the job's script acts on (`Verdict`)

A launch fails as a whole: a thread of each rank reads failures.jsonl once a second, so that a rank also exits while it
hangs in a collective. The file exists from the start, because a shared file system may cache the absence of a file for
long. The cost is one read for each rank and second.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core import atomic_files, json_files, lease
from pipeline.core.environment import node_name
from pipeline.core.errors import Failure, Kind, MachineError, PeerLost
from pipeline.core.json_files import Damaged
from pipeline.launch.job_starter import RANK_NAME

# Seconds without a new message of rank 0 after which the other ranks give up.
RENDEZVOUS_SECONDS = 600.0
USAGE_SECONDS = 5.0
# How long rank 0 waits for the usage of the others; less after a failure, which has 5 seconds in all.
FAILED_USAGE_SECONDS = 1.5
WATCH_SECONDS = 1.0
# How long a rank of a failed launch waits for rank 0 to record the failure: srun ends all ranks when one fails.
EXIT_SECONDS = 3.0
# How long a rank that lost its connection to another rank waits for the failure that this rank or the launcher
# announces.
CAUSE_SECONDS = 2.5
FOLLOWED = "followed"
FAILURES = "failures.jsonl"
# The lowest port that is tried: those of many known services lie below it.
FIRST_PORT = 20000
# Seconds between two looks at a file, at first and at most.
POLL = 0.05
SLOWEST_POLL = 1.0


@dataclass(frozen=True)
class Usage:
    """The usage of one process."""

    cpu_seconds: float
    peak_memory_bytes: int

    @classmethod
    def now(cls) -> Usage:
        """Returns the usage of this process and its children so far; the peak is that of the process alone."""
        usages = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(sum(u.ru_utime + u.ru_stime for u in usages), usages[0].ru_maxrss * 1024)

    def since(self, earlier: Usage) -> Usage:
        return Usage(self.cpu_seconds - earlier.cpu_seconds, self.peak_memory_bytes)


@dataclass(frozen=True)
class Rendezvous:
    """The message of rank 0 to the others after it has taken the lease: the number of the lease and the address."""

    lease: int
    host: str
    port: int


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its stage."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    one_host: bool = True
    folder: Path = Path()

    @classmethod
    def from_environment(cls, size: int, node_folder: Path) -> Ranks:
        """Reads the ranks from the variables of submitit, on this machine and on a cluster alike.

        Each rank records its process.
        """
        if size == 1:
            return cls()

        # Imported here, since `atom plan` and `atom status` import this module.
        import submitit

        job = submitit.JobEnvironment()
        folder = launch_folder(node_folder, job.job_id)
        folder.mkdir(parents=True, exist_ok=True)
        # From the start, because a shared file system may cache the absence of a file for long.
        (folder / FAILURES).touch()
        write(folder / f"rank-{job.global_rank}.json", lease.this_process())
        return cls(size, job.global_rank, job.local_rank, job.num_nodes == 1, folder)

    def open_rendezvous(self, lease: int) -> Rendezvous | None:
        """Writes the address for the other ranks, on rank 0. Returns None if there are no others."""
        if self.size == 1:
            return None
        rendezvous = Rendezvous(lease, "127.0.0.1" if self.one_host else node_name(), free_port())
        write(self.folder / "meeting.json", rendezvous.__dict__)
        return rendezvous

    def report_waiting(self, turns: int) -> None:
        """Reports to the other ranks at intervals that rank 0 waits for its turn.

        Raises PeerLost if one has failed.
        """
        if self.size > 1:
            if (failure := self.failure()) is not None:
                raise PeerLost(failure.text)
            if turns % 30 == 0:
                write(self.folder / "meeting.json", {"turns": turns})

    @contextmanager
    def report_busy(self, turns: int, has_progress: Callable[[], bool]) -> Iterator[None]:
        """Reports to the other ranks, from a thread, that rank 0 still checks the inputs, and asks for their help.

        Args:
            turns: The number of intervals for which it has waited.
            has_progress: Returns True if there was progress since the last call. Without any, nothing is reported, and
                the others end in time.
        """
        if self.size == 1:
            yield
            return

        def write_turns(stop: threading.Event) -> None:
            for turn in count(turns + 1):
                if has_progress() or turn == turns + 1:
                    with suppress(OSError):  # a transient error of the file system: the next report follows
                        write(self.folder / "meeting.json", {"turns": turn, "checks": True})
                # Often enough that the others give up only after many missing reports.
                if stop.wait(RENDEZVOUS_SECONDS / 20):
                    return

        # The thread is joined, so that none of its reports replaces the call to the rendezvous.
        with _thread("busy", write_turns, join=True):
            yield

    def cancel_rendezvous(self, reason: str) -> None:
        """Cancels a rendezvous that has not happened yet, on rank 0 at an end without failure."""
        if self.size > 1:
            present = read(self.folder / "meeting.json")
            # An address calls the others to the rendezvous, and must not be replaced.
            if present is None or "turns" in present:
                write(self.folder / "meeting.json", {"dismissed": reason})

    def join_rendezvous(self, help_to_check: Callable[[], None] = lambda: None) -> Rendezvous | None:
        """Waits for the call of rank 0, on another rank. Returns None if rank 0 needs no other rank.

        Raises MachineError without a call.

        Args:
            help_to_check: Is called once, when rank 0 checks the inputs.
        """
        deadline, turns, has_helped = time.monotonic() + RENDEZVOUS_SECONDS, None, False
        for _ in polls():
            message = read(self.folder / "meeting.json")
            if message is not None and "dismissed" in message:
                return None
            if message is not None and "turns" not in message:
                return Rendezvous(**message)
            if message is not None and message["turns"] != turns:  # rank 0 is alive but not ready yet
                if message.get("checks") and not has_helped:
                    help_to_check()
                    has_helped = True
                deadline, turns = time.monotonic() + RENDEZVOUS_SECONDS, message["turns"]
            process = read(self.folder / "rank-0.json")
            if process is not None and lease.has_exited(process):
                raise MachineError("rank 0 has ended; see its log")
            if time.monotonic() > deadline:
                break
        raise MachineError(f"rank 0 did not answer for {RENDEZVOUS_SECONDS:.0f} seconds; see its log")

    def announce(self, failure: Failure) -> None:
        """Dismisses every rank of the launch, with the failure."""
        if self.size > 1:
            announce(self.folder, self.rank, failure)

    def failure(self) -> Failure | None:
        """Returns the failure of the launch that another rank has announced, if any.

        The sentence names the first rank that failed.
        """
        for row in _rows(self.folder):
            if "text" in row:
                # The first line is this rank's own: the others end because of it.
                if row.get("rank") == self.rank:
                    return None
                return Failure.read(f"rank {row['rank']}: {row['text']}", row.get("kind"), str(row.get("bad_node", "")))
        return None

    def find_cause(self, failure: Failure) -> Failure:
        """Returns the cause of a lost connection: the failure that another rank announces in time.

        Returns `failure` itself if no other rank announces one.
        """
        deadline = time.monotonic() + CAUSE_SECONDS
        while self.size > 1 and time.monotonic() < deadline:
            if (cause := self.failure()) is not None:
                return cause
            time.sleep(0.2)
        return failure

    @contextmanager
    def watch_failures(self, react: Callable[[Failure], object]) -> Iterator[None]:
        """Calls `react`, from a thread of its own, once another rank has failed.

        The launcher can announce the failure as well, for a rank that was killed.
        """
        if self.size == 1:
            yield
            return

        def poll_failures(stop: threading.Event) -> None:
            while not stop.wait(WATCH_SECONDS):
                with suppress(OSError):  # a transient error of the file system: the next poll reads it
                    if (failure := self.failure()) is not None:
                        react(failure)
                        return

        with _thread("watch", poll_failures):
            yield

    def finish(self) -> None:
        """Releases the ranks that wait for rank 0 of a failed launch, once it has written everything."""
        if self.size > 1:
            _append(self.folder, {"over": True})

    def exit_after_failure(self) -> NoReturn:
        """Ends this process, on a rank other than 0 of a failed launch.

        It waits until rank 0 has written everything, or for a few seconds.
        """
        deadline = time.monotonic() + EXIT_SECONDS
        with suppress(OSError):
            while time.monotonic() < deadline and not any("over" in row for row in _rows(self.folder)):
                time.sleep(0.2)
        end_process()

    def fail(self, failure: Failure, usage: Usage) -> NoReturn:
        """Dismisses all ranks, on another rank than 0, and ends this process."""
        self.announce(failure)
        self.record_end(failure.text, usage)
        self.exit_after_failure()

    def exit_on_peer_failure(self, failure: Failure, usage: Usage) -> NoReturn:
        """Writes the stacks of this rank to its log, and exits, because the launch has failed.

        A thread of a rank other than 0 calls it.
        """
        text = f"this launch has failed ({failure.text}), so rank {self.rank} ends; it stands here:\n"
        os.write(2, text.encode())  # not `print`: the hanging thread may hold its lock
        faulthandler.dump_traceback(2, all_threads=True)
        self.record_end(failure.text, usage)
        self.exit_after_failure()

    @contextmanager
    def environment(self, rendezvous: Rendezvous | None) -> Iterator[None]:
        """Sets the variables of torch.distributed within the context; for a single rank, none are set."""
        if rendezvous is None:
            yield
            return
        address = {"MASTER_ADDR": rendezvous.host, "MASTER_PORT": rendezvous.port}
        from submitit.core.utils import environment_variables

        with environment_variables(RANK=self.rank, WORLD_SIZE=self.size, LOCAL_RANK=self.local_rank, **address):
            yield

    def record_end(self, outcome: str, usage: Usage) -> None:
        """Records the outcome and the usage of a rank other than 0, at its end.

        Args:
            outcome: FOLLOWED, or one sentence on the failure.
            usage: The usage of this process.
        """
        with suppress(OSError):  # on a full disk its usage is lost
            write(_end(self.folder, self.rank), {"outcome": outcome, "usage": usage.__dict__})

    def peer_usages(self, seconds: float = USAGE_SECONDS) -> list[Usage]:
        """Returns the usage of the other ranks that end within a few seconds, on rank 0."""
        if self.size == 1:
            return []
        deadline = time.monotonic() + seconds
        processes = {rank: read(self.folder / f"rank-{rank}.json") for rank in range(1, self.size)}
        waiting = set(processes)
        # A rank has ended if it says so, or if its process is gone.
        for _ in polls(deadline):
            exited = {rank for rank, process in processes.items() if process is not None and lease.has_exited(process)}
            names = (re.fullmatch(r"end-([0-9]+)\.json", name) for name in os.listdir(self.folder))
            waiting -= exited | {int(name[1]) for name in names if name}
            if not waiting:
                break
        ends = [read(_end(self.folder, rank)) for rank in range(1, self.size)]
        return [Usage(**end["usage"]) for end in ends if end is not None]


@contextmanager
def _thread(name: str, target: Callable[[threading.Event], None], join: bool = False) -> Iterator[None]:
    """Runs `target` in a daemon thread, and sets its event at the end of the context.

    With `join`, the end of the context waits for the thread.
    """
    stop = threading.Event()
    thread = threading.Thread(target=target, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        if join:
            thread.join()


def announce(folder: Path, rank: int, failure: Failure) -> None:
    """Dismisses every rank of the launch in `folder`, because `rank` has failed."""
    _append(folder, {"rank": rank, "node": node_name(), **failure.json()})


def _append(folder: Path, row: dict[str, Any]) -> None:
    try:
        # Appended in one piece, so that lines of one host do not mix.
        with open(folder / FAILURES, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:  # on a full disk the launcher or srun ends the others after this rank
        print(f"the other ranks cannot be notified ({error})", file=sys.stderr, flush=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of failures.jsonl.

    A line that two hosts wrote at once may be damaged: it counts as a failure all the same.
    """
    rows = []
    with suppress(FileNotFoundError):
        for line in (folder / FAILURES).read_bytes().splitlines():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                rows.append({"rank": "?", "text": "a rank failed, and its sentence is damaged", "kind": Kind.MACHINE})
    return rows


def end_process() -> NoReturn:
    """Ends this process as a failed one, whatever its other threads or the library of a collective do."""
    # `os._exit` flushes nothing itself.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def polls(deadline: float = float("inf")) -> Iterator[None]:
    """Yields at once and then at growing intervals, but not after `deadline`.

    The intervals grow because hundreds of ranks wait for one file.
    """
    pause = POLL
    while True:
        yield
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        time.sleep(min(pause, remaining))
        pause = min(SLOWEST_POLL, pause * 1.3)


def _end(folder: Path, rank: int) -> Path:
    return folder / f"end-{rank}.json"


def launch_folder(node_folder: Path, job: str) -> Path:
    """Returns the folder for the messages of one launch.

    A job that Slurm starts again is another launch, and so are ranks that the job's script starts again:
    `<job>.<restarts>.<relaunches>`.
    """
    relaunch = os.environ.get(lease.RELAUNCH_VARIABLE)
    name = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return node_folder / "ranks" / (f"{name}.{relaunch}" if relaunch else name)


def launch_number(folder: Path) -> tuple[int, int]:
    """Returns (start of the job, launch within it) of a launch folder, which grow with time."""
    _, restarts, *relaunches = folder.name.split(".")
    return int(restarts), int(relaunches[0]) if relaunches else 0


def ranks_without_end(folder: Path, exited: Iterable[int]) -> list[int]:
    """Returns the exited ranks without which the others cannot end well."""
    ends = {rank: read(_end(folder, rank)) for rank in exited}
    return sorted(rank for rank, end in ends.items() if end is None or end["outcome"] != FOLLOWED)


def has_no_end(folder: Path, rank: int) -> bool:
    """Returns True if a rank has no record of its end, like a killed one."""
    return read(_end(folder, rank)) is None


def write(path: Path, value: dict[str, Any]) -> None:
    atomic_files.write(path, json.dumps(value) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def free_port() -> int:
    """Returns a free port below the range for outgoing connections."""
    # A connection, also one of this job, could take a port of that range before the rendezvous.
    with suppress(OSError):  # this file exists only on Linux
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        for port in random.sample(range(FIRST_PORT, first), max(0, first - FIRST_PORT)):
            with socket.socket() as s, suppress(OSError):
                s.bind(("", port))
                return port
    # Without such a port, the system chooses one.
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def living_ranks(controller: int) -> dict[int, int]:
    """Returns {rank: pid} of the living processes of a job of the local executor, by the pid of its controller."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            # The name of the process stands in parentheses, and may itself contain spaces and parentheses.
            head, _, tail = path.read_bytes().rpartition(b")")
            state, parent = tail.split()[:2]
            place = re.search(rb"[(]" + RANK_NAME + rb"([0-9]+)$", head)
            if place and int(parent) == controller and state not in b"ZX":
                pids[int(place[1])] = int(path.parent.name)
    return pids


def kill_processes(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Decision(StrEnum):
    """The decision of rank 0 about a Slurm job, which the job's script acts on."""

    SEALED = "sealed"
    # All stages of the run are sealed.
    DONE = "done"
    # The job gives its nodes back and is requeued.
    RESTART = "again"
    # The ranks are launched again in the same allocation, as often as the profile allows; after that as RESTART.
    RELAUNCH = "relaunch"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """A decision and the outcome of the attempt, in the file `decision` of the launch.

    Its first line is the decision, the second the kind of a failure, the rest the outcome.
    """

    decision: Decision
    text: str
    kind: Kind | None = None

    @classmethod
    def of(cls, decision: Decision, outcome: str | Failure) -> Verdict:
        """Returns the verdict with the outcome of the attempt, which is a failure or a word such as `sealed`."""
        if isinstance(outcome, Failure):
            return cls(decision, outcome.text, outcome.kind)
        return cls(decision, outcome)

    def write(self, launch: Path) -> None:
        """Writes the verdict to the folder of the launch, atomically, and to the log."""
        atomic_files.write(launch / "decision", f"{self.decision}\n{self.kind or ''}\n{self.text}\n")
        print(f"{self.decision}: {self.text}", flush=True)

    @classmethod
    def read(cls, launch: Path) -> Verdict | None:
        """Returns the verdict of a launch; None if it does not exist yet.

        A damaged file is reported, and counts as none.
        """
        path = launch / "decision"
        with json_files.reporting("how that task ended is not known"):
            try:
                decision, kind, text = json_files.read_text(path).split("\n", 2)
                return cls(Decision(decision), text.rstrip("\n"), Kind(kind) if kind else None)
            except FileNotFoundError:
                return None
            except ValueError:
                raise Damaged(path, "it holds no decision") from None
        return None
