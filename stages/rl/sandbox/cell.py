"""A warm process under bubblewrap that runs one program at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.rl.sandbox.cgroups import PREFIX, Cgroup
from stages.rl.sandbox.inside import DEVICES
from stages.rl.sandbox.outcome import PATIENCE, Job, Limits, Outcome, SandboxFailed
from stages.rl.sandbox.running import Running

INSIDE = ("inside.py", "calls.py", "syscalls.py")
OWN_PROCESSES = 5  # bwrap's, the warm process, the supervisor
OWN_MEMORY = 64 << 20
SYSCTLS = Path("/proc/sys")
USER_NAMESPACES = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("user/max_user_namespaces", "0", "15000"),
)
"""Settings of the kernel, each with the value that forbids user namespaces and one that allows them."""


@dataclass(frozen=True)
class Program:
    source: str
    stdin: str = ""


def command(limits: Limits) -> list[str]:
    """The bwrap command. Read-only: this Python, the libraries it loads, the files of this package, four devices. No
    /proc, no network, no user namespace. The capabilities to unshare, to mount a new /tmp and to start the loopback are
    dropped before a program runs."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    base = str(Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})).parent)
    line = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    line += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp"]
    line += ["--setenv", "MALLOC_ARENA_MAX", "1"]  # glibc reserves 64 MiB of address space for each further one
    line += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_NET_ADMIN"]
    line += ["--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"):
        line += ["--ro-bind-try", folder, folder]
    line += ["--ro-bind", base, base, "--ro-bind", python, python]
    for name in ("purelib", "platlib"):
        packages = sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
        if os.path.isdir(packages):
            line += ["--tmpfs", packages, "--remount-ro", packages]
    for file in INSIDE:
        line += ["--ro-bind", str(Path(__file__).with_name(file)), f"/atom/{file}"]
    for device in DEVICES:
        line += ["--dev-bind", device, device]  # inside.py makes it read-only, which bwrap cannot without closing it
    settings = json.dumps({**asdict(limits), "own_processes": OWN_PROCESSES})
    line += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*line, python, "-S", "-s", "-P", "-X", "utf8", f"/atom/{INSIDE[0]}", settings]


def remedy(error: str) -> str:
    """Returns what to do about an error of bwrap; empty if that is unknown."""
    if "disable-userns" in error:
        return "; bubblewrap 0.8 or newer is needed"
    for name, forbids, allows in USER_NAMESPACES:
        with contextlib.suppress(OSError):
            if (SYSCTLS / name).read_text().strip() == forbids:
                return f"; this kernel forbids user namespaces; as root: sysctl -w {name.replace('/', '.')}={allows}"
    if "namespace" in error or "uid map" in error:
        return "; user namespaces are needed, which a chroot and some containers forbid, see docs/sandbox.md"
    return ""


class Cell:
    """One sandbox, which runs one program at a time. It starts and restarts by itself."""

    _numbers = itertools.count()

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Cgroup | None = None
        self._ready = False

    def start(self) -> None:
        """Starts it without waiting. Raises SandboxFailed if it cannot."""
        line, limits = command(self.limits), self.limits
        if os.geteuid() == 0:
            total = limits.memory_bytes + limits.disk_bytes + OWN_MEMORY
            name = f"{PREFIX}{os.getpid()}-{next(Cell._numbers)}"
            self._cgroup = Cgroup(name, limits.processes + OWN_PROCESSES, total)
            line = self._cgroup.wrapped(line)
        self.control, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                line,
                stdin=peer.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as e:
            self.close()
            raise SandboxFailed(f"the sandbox cannot start: {e}; apt-get install bubblewrap") from e
        finally:
            peer.close()
        self._ready = False

    def run(self, program: Program) -> Outcome:
        """Runs a job to its end. Raises SandboxFailed if the sandbox failed, and one of DEATHS if it died."""
        with self.begin({"role": "program", "source": program.source, "stdin": program.stdin}) as running:
            return running.finish()

    def begin(self, job: Job) -> Running:
        """Starts a job. Raises SandboxFailed if the sandbox does not start, and one of DEATHS if it dies."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self.start()
        if not self._ready:
            self.control.settimeout(PATIENCE)
            message = b""
            with contextlib.suppress(OSError):
                message = self.control.recv(16)
            if message != b"ready":
                raise SandboxFailed(f"the sandbox cannot start: {self._last_error()}")
            self._ready = True
        return Running(self, job, self._cgroup)

    @property
    def pid(self) -> int | None:
        """The process id of bwrap, if it runs."""
        return self._process.pid if self._process else None

    def _last_error(self) -> str:
        if self._process is None or self._process.stderr is None:
            return "it was closed"
        self._kill(self._process)
        text = self._process.stderr.read().decode(errors="replace").strip()
        self.close()
        return text.splitlines()[-1].rstrip(".") + remedy(text) if text else "bwrap printed no reason"

    @staticmethod
    def _kill(bwrap: subprocess.Popen[bytes]) -> None:
        """Kills bwrap and its first child: if bwrap dies before the child has set its parent-death signal, the child
        waits forever for a message from it, and holds its message pipe open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bwrap.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills everything in it."""
        if self._process is not None:
            self.control.close()
            self._kill(self._process)
            if self._process.stderr:
                self._process.stderr.read()  # the other end is held by process 1 of the sandbox, which dies last
                self._process.stderr.close()
            self._process.wait()
            self._process = None
        if self._cgroup is not None:
            self._cgroup.close()
            self._cgroup = None
