"""One program in a sandbox: sends its job, receives its lines and its output, and ends it in time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol

from stages.rl.sandbox.cgroups import Cgroup
from stages.rl.sandbox.outcome import PATIENCE, Job, Limits, Outcome, SandboxFailed, Status


class Host(Protocol):
    """The interface of a cell for its program."""

    limits: Limits
    control: socket.socket

    @property
    def pid(self) -> int | None: ...

    def close(self) -> None: ...


class Running:
    """A program in its cell. As a context: its remaining processes are killed at the end."""

    def __init__(self, cell: Host, job: Job, cgroup: Cgroup | None) -> None:
        self.cell, self.limits, self._cgroup = cell, cell.limits, cgroup
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
