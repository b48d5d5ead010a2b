"""One worker at a time for a key, on any shared file system.

A lease is the highest `lease.<n>` in the work folder. Taking it means creating `lease.<n+1>` by hard link, which is
atomic on local disks and on NFS alike; nobody ever removes another's lease, so two takers cannot both win. The
holder refreshes its file's time; a lease whose time is older than EXPIRY, or whose process is known to be gone, may
be succeeded. A taker compares no clocks of hosts: "now" is the time that the file system assigns to a file written now.
Read-only callers write nothing and use the clock of their host.

`SharedProgress` shows those who wait that somebody works: a process that reads, hashes or writes touches one file, and
one that waits compares the time of that file with the time that it saw before.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files
from pipeline.core.json_files import Damaged

# Seconds after the last heartbeat until a lease may be succeeded, and seconds between two heartbeats. Several
# heartbeats fit in, since a slow file system may delay some.
EXPIRY = 60.0
HEARTBEAT = 10.0
# Has the number of the launch within this start of the Slurm job, from 1 on for the second; not set for the first.
RELAUNCH_VARIABLE = "ATOM_RELAUNCH"
# The host of an unknown holder.
UNREADABLE = "an unreadable lease"


class Process(TypedDict):
    """The body of a lease: the process that holds it."""

    host: str
    """name of the host"""
    boot: str
    """the kernel's boot id; empty if the host has none"""
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    """process id"""
    start: str | None
    """start time of the process in clock ticks since boot; a later process with its pid has another"""
    job: NotRequired[str]
    """id of its Slurm job"""
    restart: NotRequired[Annotated[int, Field(ge=0, lt=2**31)]]
    """how often Slurm has started that job again"""
    relaunch: NotRequired[Annotated[int, Field(ge=0, lt=2**31)]]
    """number of the launch within this start of the job, absent for the first"""
    released: NotRequired[bool]
    """true once the lease is released"""


BODY = TypeAdapter(Process)


def _process_start(pid: int) -> str | None:
    """Returns the start time of a local process in clock ticks since boot; it distinguishes a reused pid.

    None if the process has exited; a zombie counts as exited (the init of a container may never reap it).
    """
    try:
        # The name of the program stands in parentheses, and may itself contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    """Returns the id of this host's boot; "" if the host has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def this_process() -> dict[str, str | int | None]:
    """Returns this process as a `Process`, by which others can check whether it is alive."""
    pid = os.getpid()
    process: dict[str, str | int | None] = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": pid,
        "start": _process_start(pid),
    }
    if job := os.environ.get("SLURM_JOB_ID"):
        process |= {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
        if relaunch := os.environ.get(RELAUNCH_VARIABLE):
            process["relaunch"] = int(relaunch)
    return process


def is_superseded(process: Mapping[str, Any]) -> bool:
    """Returns True if that process belongs to an earlier launch of this process's Slurm job.

    Slurm or the job's script gave that launch up, even if its process is alive on a node whose daemon died.
    """
    current = this_process()
    return (
        process.get("job") is not None
        and process["job"] == current.get("job")
        and _launch_number(process) < _launch_number(current)
    )


def _launch_number(process: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (start of the Slurm job, launch within it), which grow with time."""
    return int(process.get("restart") or 0), int(process.get("relaunch") or 0)


def has_exited(process: Mapping[str, Any]) -> bool:
    """Returns True if the process that `this_process` described has exited for certain.

    Returns False for a process of another host.
    """
    # A process id means something on one host only, and only until its next boot.
    if process.get("host") != socket.gethostname() or process.get("boot") != _boot():
        return False
    start = _process_start(int(process["pid"]))
    return start is None or start != process.get("start")


@dataclass(frozen=True)
class Holder:
    """The holder of a lease, and whether the lease still counts."""

    # The <n> of its file `lease.<n>`.
    number: int
    # The host and the id of the process; `UNREADABLE` and 0 for an unreadable lease.
    host: str
    pid: int
    # True if nobody may succeed the holder yet.
    alive: bool


def holder(folder: Path, clock: Callable[[Path], float] | None = None) -> Holder | None:
    """Returns the present lease of a work folder; None without one. Nothing is written.

    An unreadable lease is reported, and counts until it expires.

    Args:
        folder: The work folder.
        clock: The time by the clock of the file system, for callers that may write there; the default is this host's
            clock.
    """
    numbers: list[int] = []
    with json_files.reporting("whether a process works there is not known"):
        matches = (re.fullmatch(r"lease\.([0-9]{1,18})", name) for name in json_files.names(folder))
        numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        return None
    number = max(numbers)
    path = folder / f"lease.{number}"
    try:
        age = (time.time() if clock is None else clock(folder)) - path.lstat().st_mtime
        process = json_files.read(path, BODY)
    except FileNotFoundError:
        return None
    except Damaged as error:  # perhaps cut by a crash of the machine
        json_files.report(error, f"it counts until it is {EXPIRY:.0f} s old")
        return Holder(number, UNREADABLE, 0, age < EXPIRY)
    alive = age < EXPIRY and not process.get("released") and not has_exited(process) and not is_superseded(process)
    return Holder(number, process["host"], process["pid"], alive)


def file_system_time(folder: Path) -> float:
    """Returns the present time by the clock of the file system that holds a folder."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


class Lease:
    """A lease that is held from `take` to `release`.

    `lost` becomes true after a successor took over because this holder seemed dead.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / f"lease.{number}"
        # Called once by the thread that refreshes the lease when it sees a successor.
        self.on_lost: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> Lease | None:
        """Takes the lease, or returns None if another live worker holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            current = holder(folder, file_system_time)
            if current is not None and current.alive:
                return None
            number = current.number + 1 if current else 1
            # The link appears with its content complete, and fails if another worker was faster.
            draft = folder / f".lease-{uuid.uuid4().hex}"
            with open(draft, "w") as file:
                file.write(json.dumps(this_process()))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, folder / f"lease.{number}")
            except FileExistsError:
                time.sleep(0.1)
                continue
            finally:
                draft.unlink()
            return cls(folder, number)

    @property
    def lost(self) -> bool:
        """True if a successor took over, or if the file of the lease is gone.

        Raises OSError if the file system does not answer.
        """
        return _exists(self.folder / f"lease.{self.number + 1}") or not _exists(self.path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            lost = False
            with suppress(OSError):  # a transient error of the file system: the next heartbeat tries again
                os.utime(self.path)
            with suppress(OSError):
                lost = self.lost
            if lost:
                self.on_lost()
                return

    def release(self) -> None:
        """Lets a successor start at once.

        The file stays, so that numbers only grow. If the file cannot be written, the lease expires.
        """
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if not self.lost:
                replacement = self.folder / f".lease-{uuid.uuid4().hex}"
                replacement.write_text(json.dumps({**this_process(), "released": True}))
                os.replace(replacement, self.path)


def _exists(path: Path) -> bool:
    """Returns True if the path exists. Raises OSError if the file system does not answer, unlike `Path.exists`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def draft_folder(work: Path, lease: int, step: int | None = None) -> Path:
    """Returns the folder in which the holder of a lease writes a product before it is sealed.

    Args:
        work: The work folder of the key.
        lease: The number of the lease.
        step: The step of the checkpoint that is drafted; None for the product of the stage itself.
    """
    return work / (f"out.{lease}" if step is None else f"out.{lease}@{step}")


class SharedProgress:
    """One process's view of the shared file. Any thread may use it.

    Args:
        path: The shared file. Its folder must exist once there is progress.
        interval: Seconds between two touches by this process.
    """

    def __init__(self, path: Path, interval: float) -> None:
        self.path, self.interval = path, interval
        self._next_touch = 0.0
        self._seen = self._time()

    def report(self, size: int = 0) -> None:
        """Shows the others that this process made progress. Cheap: call it after each piece of work.

        Args:
            size: Bytes that were read, hashed or written, for callers that count them. It is not used.
        """
        now = time.monotonic()
        # Touching the file for each piece of work would load the file system.
        if now < self._next_touch:
            return
        self._next_touch = now + self.interval
        with suppress(OSError):  # on a full disk the work itself fails with a sentence
            self.path.touch()

    def has_moved(self) -> bool:
        """Returns True if any process, this one included, has touched the file since the last call."""
        current = self._time()
        moved = current != self._seen
        self._seen = current
        return moved

    def _time(self) -> int:
        """Returns the file's time of modification in nanoseconds; 0 without a file."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0
