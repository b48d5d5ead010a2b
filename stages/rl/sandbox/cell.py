"""A warm process under bubblewrap that runs one program at a time, and the program that runs in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.rl.sandbox.inside import DEVICES
from stages.rl.sandbox.limits import PATIENCE, PREFIX, Cgroup, Job, Limits, Outcome, SandboxFailed, Status

INSIDE = ("inside.py", "syscalls.py", "syscalls.txt")
OWN_PROCESSES = 5  # bwrap's, the warm process, the supervisor
# Bytes of memory of these processes.
OWN_MEMORY = 64 << 20
# Words of bwrap's errors where user namespaces are forbidden.
FORBIDDEN = ("namespace", "uid map", "No permissions")


class Running:
    """A program in its cell. Used as a context, it kills its remaining processes at the end."""

    def __init__(self, cell: Cell, job: Job, cgroup: Cgroup | None) -> None:
        self.cell, self.limits, self._cgroup = cell, cell.limits, cgroup
        # The count of the cell's group includes its earlier programs.
        self._killed_before = cgroup.out_of_memory() if cgroup else 0
        self._reason: Status | None = None
        self._exit: tuple[int, float] | None = None
        self._deadline = time.monotonic() + cell.limits.wall_seconds
        self._selector = selectors.DefaultSelector()
        self._channel, peer = socket.socketpair()
        (out, out_writer), (err, err_writer) = os.pipe(), os.pipe()
        self._texts = {out: bytearray(), err: bytearray()}
        self._lines = bytearray()
        for file in (self._channel, out, err, cell.control):
            self._selector.register(file, selectors.EVENT_READ)
        try:
            socket.send_fds(cell.control, [b"run"], [peer.fileno(), out_writer, err_writer])
        except OSError:
            cell.close()
            self.close()
            raise
        finally:
            # The child alone may hold these ends, or their end would never show here.
            peer.close()
            os.close(out_writer)
            os.close(err_writer)
        try:
            if self.ask(json.dumps(job).encode()) is None:  # its report of confinement; no code has run yet
                raise SandboxFailed(f"the sandbox cannot confine a program: {self.finish()}")
        except BaseException:
            self.close()
            raise

    def ask(self, message: bytes | None = None) -> bytes | None:
        """Sends a line, if given, and returns the next line that comes back; None if the program ends before."""
        if message is not None:
            self._send(message)
        self._pump(lambda: b"\n" in self._lines or self._channel.fileno() < 0)
        line, newline, rest = self._lines.partition(b"\n")
        self._lines = rest
        if newline and self._reason is None:
            return bytes(line)
        # It has no more output. Its end comes from its supervisor's report, or from the clock, never from their order.
        self._pump(lambda: self._exit is not None)
        return None

    def finish(self) -> Outcome:
        """Closes the channel, waits for the end, and returns the outcome."""
        self._close_channel()
        self._pump(lambda: self._exit is not None)
        self._pump(lambda: len(self._selector.get_map()) <= 1)  # the rest in the pipes of ended processes
        assert self._exit is not None
        code, cpu_seconds = self._exit
        out, err = (bytes(t[: self.limits.output_bytes]).decode(errors="replace") for t in self._texts.values())
        return Outcome(self._status(code, cpu_seconds, err), out, err, code, cpu_seconds)

    def _status(self, code: int, cpu_seconds: float, err: str) -> Status:
        if self._reason or code == 0:
            return self._reason or "ok"
        if (
            code == -9 and cpu_seconds >= self.limits.cpu_seconds / 2
        ):  # the kernel counts ticks for the one, not for the other
            return "timeout"
        if self._out_of_memory() or err.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            return "memory"
        return "error" if code > 0 else "killed"

    def _out_of_memory(self) -> bool:
        return self._cgroup is not None and self._cgroup.out_of_memory() > self._killed_before

    def _send(self, line: bytes) -> None:
        if self._channel.fileno() < 0:
            return
        # A program that does not read must not hold this process up. A time-out of 0 would mean not to wait at all.
        self._channel.settimeout(max(self._deadline - time.monotonic(), 0.001))
        try:
            self._channel.sendall(line + b"\n")
        except TimeoutError:
            self._kill("timeout")
        except OSError:
            pass  # it reads nothing more; its earlier output remains to be read

    def _pump(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                self._kill("timeout")
            for key, _ in self._selector.select(max(remaining, 0)):
                if key.fileobj is self.cell.control:
                    self._handle_end(self._read_report())
                    continue
                data = self._read(key.fd)
                if not data:
                    self._selector.unregister(key.fileobj)
                    if key.fd not in self._texts:
                        self._channel.close()
                    continue
                buffer = self._texts.get(key.fd, self._lines)
                # Output that comes after the decision to kill is dropped.
                if self._reason is None:
                    buffer += data
                if len(buffer) > self.limits.output_bytes:
                    self._kill("output")

    def _read(self, file: int) -> bytes:
        try:
            return os.read(file, 65536)
        except ConnectionResetError:  # it ended before it read the message
            return b""
        except OSError:  # normal use of the channel cannot cause this
            self._kill("killed")
            return b""

    def _read_report(self) -> bytes:
        try:
            return self.cell.control.recv(256)
        except ConnectionResetError:  # it died before it read a request
            return b""

    def _handle_end(self, message: bytes) -> None:
        if message:
            code, cpu_seconds = json.loads(message)
            self._exit = code, cpu_seconds
            return
        out_of_memory = self._out_of_memory()
        self.cell.close()
        if not out_of_memory:
            raise BrokenPipeError("the sandbox was killed")
        self._reason, self._exit = "memory", (-9, 0.0)  # the kernel also killed the warm process
        self._selector.unregister(self.cell.control)

    def _kill(self, reason: Status) -> None:
        if self._exit is not None:
            if reason == "output":  # over the limit, although it had ended when the output was read
                self._reason = self._reason or reason
            return
        now = time.monotonic()
        if self._reason is None:
            self._reason, self._deadline = reason, now + PATIENCE
            self.cell.control.send(b"kill")
        elif now >= self._deadline:
            self.cell.close()
            raise SandboxFailed(f"a program could not be killed within {PATIENCE:.0f} seconds; see the kernel's log")

    def _close_channel(self) -> None:
        if self._channel.fileno() >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._channel)
            self._channel.close()

    def close(self) -> None:
        self._close_channel()
        if self._exit is None and self.cell.pid is not None:
            try:
                self._kill("killed")
                self._pump(lambda: self._exit is not None)  # further output is dropped
            except (OSError, SandboxFailed):
                self.cell.close()
        self._selector.close()
        for file in self._texts:
            os.close(file)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Program:
    source: str


def command(limits: Limits) -> list[str]:
    """Returns the bwrap command.

    Read-only: this Python, the libraries it loads, the files of this package, four devices. No /proc, no network, no
    user namespace. The capabilities to unshare, to mount a new /tmp and to start the loopback are dropped before a
    program runs.
    """
    # The base interpreter: a virtual environment links to files that are not visible inside.
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
            # Installed packages are hidden, so that programs have the standard library alone.
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
    if any(word in error for word in FORBIDDEN):
        return (
            "; user namespaces are needed, which a setting of the kernel, a chroot and some containers forbid, see "
            "docs/sandbox.md"
        )
    return ""


class Cell:
    """One sandbox, which runs one program at a time. It starts and restarts by itself."""

    # Numbers for the names of groups, which differ among the cells of a process.
    _numbers = itertools.count()

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Cgroup | None = None
        self._ready = False

    def start(self) -> None:
        """Starts it without waiting.

        Raises:
            SandboxFailed: It cannot.
        """
        line, limits = command(self.limits), self.limits
        # The kernel applies no limit on processes to root (see limits.py).
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
        """Runs a job to its end.

        Raises:
            SandboxFailed: The sandbox failed. If it died, one of DEATHS is raised instead.
        """
        with self.begin({"role": "program", "source": program.source}) as running:
            return running.finish()

    def begin(self, job: Job) -> Running:
        """Starts a job.

        Raises:
            SandboxFailed: The sandbox does not start. If it dies, one of DEATHS is raised instead.
        """
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
        # Its text ends only when the process has ended.
        self._kill(self._process)
        text = self._process.stderr.read().decode(errors="replace").strip()
        self.close()
        return text.splitlines()[-1].rstrip(".") + remedy(text) if text else "bwrap printed no reason"

    @staticmethod
    def _kill(bwrap: subprocess.Popen[bytes]) -> None:
        """Kills bwrap and its first child.

        If bwrap dies before the child has set its parent-death signal, the child waits forever for a message from it,
        and holds its message pipe open.
        """
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
