"""The limits of a program, its outcome, and the control groups that bound all processes of one sandbox.

Root needs the groups, of version 1 or 2, because the kernel applies no limit on processes to root. Other users have
RLIMIT_NPROC, which counts per user namespace, and every sandbox has its own namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from pipeline.core.errors import MachineError

PATIENCE = 60.0  # seconds in which this project's processes start or answer, also on a busy machine

Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]
# The exceptions when a sandbox died while it ran a program: it was killed from outside, or by the program.
DEATHS = (BrokenPipeError, ConnectionResetError)


class Job(TypedDict):
    """The job of a child in a sandbox.

    Attributes:
        role: A whole program; or an answer's functions, which it calls on request; or a check that calls them.
        source: Its source.
        prelude: Source that runs before; a program has none.
        entry_point: The name of the function.
    """

    role: Literal["program", "answer", "check"]
    source: str
    prelude: NotRequired[str]
    entry_point: NotRequired[str]


class SandboxFailed(MachineError):
    """The sandbox itself failed; the result of the program is unknown."""


@dataclass(frozen=True)
class Limits:
    """The limits of a program.

    cpu_seconds bound each process and are the effective limit; wall_seconds are far above, so that no good program
    fails on a busy machine, and end sleeping programs.

    Attributes:
        cpu_seconds: Processor time of each process.
        wall_seconds: Time of the clock for the program.
        memory_bytes: Address space of each process, and, under root, memory of all together.
        disk_bytes: Size of /tmp.
        file_bytes: Size of one file.
        processes: Number of processes and threads.
        open_files: Open descriptors of one process.
        output_bytes: Size of standard output, of standard error, and of each message, separately.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 40.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    file_bytes: int = 16 << 20
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Outcome:
    """The end of a program.

    Attributes:
        status: How it ended.
        stdout: Its standard output.
        stderr: Its standard error.
        exit_code: Its exit code; negative if a signal ended it.
        cpu_seconds: Time of its first process and those that this waited for.
    """

    status: Status
    stdout: str
    stderr: str
    exit_code: int
    cpu_seconds: float


# Version 1's and 2's names of the two limits.
FILES = {"pids": ("pids.max", "pids.max"), "memory": ("memory.limit_in_bytes", "memory.max")}
PREFIX = "atom-sandbox-"  # followed by the id of the process that made it
SWAP = ("memory.memsw.limit_in_bytes", "memory.swap.max")


@dataclass(frozen=True)
class Home:
    """The location of this process's groups: `folder` is its group, `top` is the mount."""

    version: int
    top: Path
    folder: Path


def homes(mounts: str, membership: str) -> dict[str, Home]:
    """Returns the home of "pids" and "memory", if it has one, by /proc/self/mountinfo and /proc/self/cgroup.

    Version 1 wins where both are mounted: a controller that it has is absent from version 2.
    """
    groups = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update({name: path for name in controllers.split(",")})
    by_controller: dict[str, Home] = {}
    for line in mounts.splitlines():
        mount_part, _, filesystem_part = line.partition(" - ")
        root, top = mount_part.split()[3:5]
        kind, _, options = filesystem_part.split(None, 2)
        names = [n for n in FILES if kind == "cgroup2" or (kind == "cgroup" and n in options.split(","))]
        for name in names:
            version = 2 if kind == "cgroup2" else 1
            # The line of version 2 names no controllers.
            path = groups.get(name if version == 1 else "", "/")
            relative = os.path.relpath(path, root) if path.startswith(root) else "."
            if name not in by_controller or version == 1:
                by_controller[name] = Home(version, Path(top), Path(top, relative))
    return by_controller


class Cgroup:
    """A group of its own for each controller of this machine. `close` kills its processes."""

    def __init__(
        self, name: str, processes: int, memory_bytes: int, controller_homes: dict[str, Home] | None = None
    ) -> None:
        """Makes the groups. Memory is bounded if possible.

        Raises:
            SandboxFailed: No group that bounds processes can be made.
        """
        if controller_homes is None:
            controller_homes = homes(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
        self.folders: list[Path] = []
        for controller, value in (("pids", processes), ("memory", memory_bytes)):
            home = controller_homes.get(controller)
            folder = self._folder(home, name, FILES[controller][home.version - 1]) if home else None
            if home and folder:
                (folder / FILES[controller][home.version - 1]).write_text(str(value))
                swap = folder / SWAP[home.version - 1]
                if controller == "memory" and swap.exists():
                    # Version 1 bounds memory and swap together, version 2 bounds swap by itself.
                    swap.write_text(str(value if home.version == 1 else 0))
            elif controller == "pids":
                raise SandboxFailed(
                    "the sandbox cannot bound root's processes here: no control group with pids.max can be made under "
                    "/sys/fs/cgroup; mount the pids controller writable there, or run as another user than root"
                )

    def _folder(self, home: Home, name: str, file_name: str) -> Path | None:
        """Returns the group with the file `file_name`; None if none can be made.

        It is made in this process's group, or in the nearest parent that allows it.

        Version 2 gives no controller to the children of a group that has processes of its own.
        """
        for folder in self.folders:
            if (folder / file_name).exists():
                return folder
        for parent in (home.folder, *home.folder.parents):
            with contextlib.suppress(OSError):
                folder = parent / name
                for controller in FILES if home.version == 2 else ():
                    with contextlib.suppress(OSError):
                        (parent / "cgroup.subtree_control").write_text(f"+{controller}")
                folder.mkdir()
                if (folder / file_name).exists():
                    self.folders.append(folder)
                    _sweep(parent)
                    return folder
                # Without the file of its limit, the group would bound nothing.
                folder.rmdir()
            if parent == home.top:
                break
        return None

    def wrapped(self, command: list[str]) -> list[str]:
        """Returns a command that enters the group and then executes `command`."""
        files = [str(folder / "cgroup.procs") for folder in self.folders]
        # The shell enters the groups before it becomes the command, so no process of the sandbox is ever outside.
        script = 'n=$1; shift; while [ $n -gt 0 ]; do echo $$ > "$1" || exit 1; shift; n=$((n-1)); done; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", str(len(files)), *files, *command]

    def processes(self) -> set[int]:
        """Returns the process ids in all folders of the group."""
        return {int(n) for folder in self.folders for n in _read(folder / "cgroup.procs").split()}

    def out_of_memory(self) -> int:
        """Returns the number of processes in the group that the kernel killed for memory."""
        lines = [
            line.split()
            for f in self.folders
            for name in ("memory.oom_control", "memory.events")
            for line in _read(f / name).splitlines()
        ]
        return sum(int(count) for name, count in lines if name == "oom_kill")

    def close(self) -> None:
        """Kills its remaining processes and removes it.

        Raises:
            SandboxFailed: One cannot be killed.
        """
        # Killed processes take a moment to leave, and only an empty group can be removed.
        for _ in range(500):
            for folder in self.folders:
                with contextlib.suppress(OSError):  # version 2 in a kernel since 5.14
                    if (folder / "cgroup.kill").exists():
                        (folder / "cgroup.kill").write_text("1")
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for folder in list(self.folders):
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    self.folders.remove(folder)
            if not self.folders:
                return
            time.sleep(0.01)
        raise SandboxFailed(f"{self.folders[0]} holds processes that cannot be killed: {sorted(self.processes())}")


def _sweep(parent: Path) -> None:
    """Removes the empty groups of processes that were killed before they could."""
    for folder in parent.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX).partition("-")[0]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
