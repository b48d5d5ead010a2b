"""How the ranks of one stage find each other: rank 0 does the worker's work, the others follow it.

A launch is one start of a job, and what its ranks tell each other lies in a folder of its own, so that nothing stale is
ever believed: `logs/<run>/<node>/ranks/<job>.<restarts>/` with

    rank-<rank>.json    the process of a rank
    meeting.json        what it decided: where to meet, or why nobody is needed
    end-<rank>.json     how another rank ended, and what it used
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import environment_variables

from pipeline import lease
from pipeline.errors import AtomError

MEETING_SECONDS = 600.0
USAGE_SECONDS = 5.0
FOLLOWED = "followed"
FIRST_PORT = 20000
POLL = 0.05


@dataclass(frozen=True)
class Usage:
    """What one process used."""

    cpu_seconds: float
    peak_memory_bytes: int

    @classmethod
    def now(cls) -> Usage:
        """Of this process and its children so far; the peak is the process's own."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(sum(u.ru_utime + u.ru_stime for u in used), used[0].ru_maxrss * 1024)

    def since(self, before: Usage) -> Usage:
        return Usage(self.cpu_seconds - before.cpu_seconds, self.peak_memory_bytes)


@dataclass(frozen=True)
class Meeting:
    """What rank 0 tells the others once it holds the lease: the product's folder and where to meet."""

    out: str
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
    def here(cls, size: int, node_folder: Path) -> Ranks:
        """As submitit says it, on this machine and on a cluster alike. Each rank leaves word of itself."""
        if size == 1:
            return cls()
        job = submitit.JobEnvironment()
        folder = launch_folder(node_folder, job.job_id)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"rank-{job.global_rank}.json", lease.me())
        return cls(size, job.global_rank, job.local_rank, job.num_nodes == 1, folder)

    def call(self, out: Path) -> Meeting | None:
        """Rank 0: calls the others to a meeting. None if there are no others."""
        if self.size == 1:
            return None
        meeting = Meeting(out.name, "127.0.0.1" if self.one_host else node_name(), free_port())
        write(self.folder / "meeting.json", meeting.__dict__)
        return meeting

    def dismiss(self, why: str) -> None:
        """Rank 0, at its end: if there was no meeting, there will be none."""
        if self.size > 1 and not (self.folder / "meeting.json").exists():
            with suppress(OSError):  # on a full disk the others see that rank 0 is gone
                write(self.folder / "meeting.json", {"dismissed": why})

    def meet(self) -> Meeting:
        """Another rank: waits for rank 0's call. Raises AtomError if it does not come."""
        deadline = time.monotonic() + MEETING_SECONDS
        while time.monotonic() < deadline:
            said = read(self.folder / "meeting.json")
            if said is not None and "dismissed" in said:
                raise AtomError(f"rank 0 needs no other ranks ({said['dismissed']})")
            if said is not None:
                return Meeting(**said)
            if self._gone(0):
                raise AtomError("rank 0 is gone; its own log may tell why")
            time.sleep(POLL)
        raise AtomError(f"rank 0 said nothing for {MEETING_SECONDS:.0f} seconds; its own log may tell why")

    @contextmanager
    def environment(self, meeting: Meeting | None) -> Iterator[None]:
        """The variables by which torch.distributed finds the others, for a while; none of them for one rank alone."""
        if meeting is None:
            yield
            return
        where = {"MASTER_ADDR": meeting.host, "MASTER_PORT": meeting.port}
        with environment_variables(RANK=self.rank, WORLD_SIZE=self.size, LOCAL_RANK=self.local_rank, **where):
            yield

    def leave(self, outcome: str, usage: Usage) -> None:
        """Another rank, at its end. outcome: FOLLOWED, or one sentence on what went wrong."""
        write(_end(self.folder, self.rank), {"outcome": outcome, "usage": usage.__dict__})

    def others(self) -> list[Usage]:
        """Rank 0: what the others used, of those that come to their end within a few seconds."""
        waiting, deadline = set(range(1, self.size)), time.monotonic() + USAGE_SECONDS
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if not self._gone(rank) and not _end(self.folder, rank).exists()}
            time.sleep(POLL if waiting else 0)
        ends = [read(_end(self.folder, rank)) for rank in range(1, self.size)]
        return [Usage(**end["usage"]) for end in ends if end is not None]

    def _gone(self, rank: int) -> bool:
        """Whether a rank's process is known to be gone."""
        who = read(self.folder / f"rank-{rank}.json")
        return who is not None and lease.gone(who)


def node_name() -> str:
    """This node as Slurm, or else the system, calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _end(folder: Path, rank: int) -> Path:
    return folder / f"end-{rank}.json"


def launch_folder(node_folder: Path, job: str) -> Path:
    """What the ranks of one launch tell each other. A job that Slurm starts again is another launch."""
    return node_folder / "ranks" / f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def lost(folder: Path, gone: Iterable[int]) -> list[int]:
    """The ranks, of those that are gone, without which the others cannot end well."""
    ends = {rank: read(_end(folder, rank)) for rank in gone}
    return sorted(rank for rank, end in ends.items() if end is None or end["outcome"] != FOLLOWED)


def write(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value) + "\n")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def free_port() -> int:
    """A free port below those that the system gives to outgoing connections: one of them, this job's own included,
    might take it between here and the meeting."""
    with suppress(OSError):  # no such file but on Linux
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        for port in random.sample(range(FIRST_PORT, first), max(0, first - FIRST_PORT)):
            with socket.socket() as s, suppress(OSError):
                s.bind(("", port))
                return port
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def tasks(controller: int) -> dict[int, int]:
    """{rank: pid} of the living processes of a job of the local executor, by the pid of its controller."""
    return dict(_tasks(controller))


def _tasks(controller: int) -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            if int(parent) != controller or state in b"ZX":
                continue
            for variable in (path.parent / "environ").read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"SUBMITIT_LOCAL_GLOBALID":
                    yield int(value), int(path.parent.name)


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
