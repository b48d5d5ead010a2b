"""One worker at a time for a key, on any shared file system.

A lease is the highest `lease.<n>` in the work folder. Taking it means creating `lease.<n+1>` by hard link, which is
atomic on local disks and on NFS alike; nobody ever removes another's lease, so two takers cannot both win. The
holder refreshes its file's time; a lease whose time is older than EXPIRY, or whose process is known to be gone, may
be succeeded. Clocks of hosts are not compared: "now" is the time that the file system gives to a file written now.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPIRY = 60.0
HEARTBEAT = 10.0


def _process_start(pid: int) -> str | None:
    """The start time of a local process in clock ticks since boot, which tells a reused pid apart.

    None if it is gone; a dead one that nobody has waited for yet (a container's init may never do so) is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def me() -> dict[str, str | int | None]:
    """This process, so that others can tell whether it still lives; in a Slurm job also the job and its start."""
    pid = os.getpid()
    who: dict[str, str | int | None] = {"host": socket.gethostname(), "boot": _boot(), "pid": pid}
    who["start"] = _process_start(pid)
    if job := os.environ.get("SLURM_JOB_ID"):
        who |= {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    return who


def succeeded(who: Mapping[str, Any]) -> bool:
    """Whether that process belongs to an earlier start of the Slurm job that this one belongs to: Slurm gave it up,
    even if it lives on where its node's daemon died."""
    own = me()
    return (
        who.get("job") is not None and who["job"] == own.get("job") and int(who["restart"]) < int(own["restart"] or 0)
    )


def gone(who: Mapping[str, Any]) -> bool:
    """Whether the process that `me` described is known to be gone; of another host's, nothing is known."""
    if who.get("host") != socket.gethostname() or who.get("boot") != _boot():
        return False
    start = _process_start(int(who["pid"]))
    return start is None or start != who.get("start")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, and whether it still counts."""

    number: int
    host: str
    pid: int
    alive: bool


def holder(folder: Path) -> Holder | None:
    """The present lease of a work folder, or None if there is none."""
    numbers = [int(p.name.split(".")[1]) for p in folder.glob("lease.*") if p.name.split(".")[1].isdigit()]
    if not numbers:
        return None
    path = folder / f"lease.{max(numbers)}"
    try:
        age = _age(path)
        who = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # cut by a crash of the machine: it counts until it is old
        return Holder(max(numbers), "an unreadable lease", 0, age < EXPIRY)
    alive = age < EXPIRY and not who.get("released") and not gone(who) and not succeeded(who)
    return Holder(max(numbers), str(who.get("host")), int(who.get("pid", 0)), alive)


def _age(path: Path) -> float:
    """Seconds since `path` was refreshed, by the file system's own clock."""
    probe = path.parent / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


class Lease:
    """Held from `take` to `release`. `lost` becomes true when a successor took over (we were thought dead)."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / f"lease.{number}"
        self.on_lost: Callable[[], None] = lambda: None
        """Called by the thread that refreshes the lease, once it sees a successor."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> Lease | None:
        """Takes the lease, or returns None if another live worker holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            present = holder(folder)
            if present is not None and present.alive:
                return None
            number = present.number + 1 if present else 1
            mine = folder / f".lease-{uuid.uuid4().hex}"
            with open(mine, "w") as file:
                file.write(json.dumps(me()))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(mine, folder / f"lease.{number}")
            except FileExistsError:
                time.sleep(0.1)  # somebody was faster: look again
                continue
            finally:
                mine.unlink()
            return cls(folder, number)

    @property
    def lost(self) -> bool:
        return (self.folder / f"lease.{self.number + 1}").exists() or not self.path.exists()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(FileNotFoundError):
                os.utime(self.path)
            if self.lost:
                return self.on_lost()

    def release(self) -> None:
        """Lets a successor start at once. The file stays, so that numbers only grow."""
        self._stop.set()
        self._thread.join()
        if not self.lost:
            replacement = self.folder / f".lease-{uuid.uuid4().hex}"
            replacement.write_text(json.dumps({**me(), "released": True}))
            os.replace(replacement, self.path)
