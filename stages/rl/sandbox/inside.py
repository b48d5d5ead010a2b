"""The process inside bubblewrap: it stays warm and forks a further confined child for each program.

    python -S -s -P inside.py LIMITS_AS_JSON      # fd 0: the control socket; started by stages.rl.sandbox.cell only

This process never runs model-written code. A program's child has process, mount, IPC and network namespaces of its own
and is process 1 and leader of a session there: it can signal no process outside, and when it ends or is killed, all its
children are dead, and its /tmp and its sockets are gone. Its supervisor, outside of those namespaces, reports its end;
the child has no descriptor for doing so itself. Standard library only; no other file of this project is visible here.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import json
import os
import platform
import random
import re  # noqa: F401  (warm: what answers import most)
import resource
import select
import signal
import socket
import struct
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from stages.rl.sandbox import calls, syscalls
else:  # inside there is no package, only the files beside this one
    sys.path.insert(0, os.path.dirname(__file__))
    import calls
    import syscalls

    sys.path.pop(0)

# Descriptor of the channel in a program's child.
CHANNEL = 3
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LIBC = ctypes.CDLL(None, use_errno=True)


class Channel:
    """Lines of JSON to and from the parent outside."""

    def __init__(self) -> None:
        self.lines = os.fdopen(CHANNEL, "rb", closefd=False)

    def receive(self) -> Any:
        """Returns the next message. Raises EOFError when the parent has closed its end."""
        line = self.lines.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(CHANNEL, data) :]


def main() -> int:
    """Forks a supervisor for each request, which is three descriptors: channel, standard output, standard error."""
    limits = json.loads(sys.argv[1])
    if platform.machine() not in syscalls.MACHINES:
        print(f"the list of system calls that a program may make is missing for {platform.machine()}", file=sys.stderr)
        return 1
    _check(LIBC.unshare(0x00020000), "unshare")  # CLONE_NEWNS; bwrap's belongs to an outer user namespace
    for device in DEVICES:
        # The host's inode, since no other can be had in a user namespace. Read-only, it can still be written to as the
        # device that it is, but its mode, owner, times and attributes stay.
        flags = 32 | 4096 | 1 | 2 | 8  # MS_REMOUNT, MS_BIND, MS_RDONLY, MS_NOSUID, MS_NOEXEC
        _check(LIBC.mount(None, device.encode(), None, flags, None), f"mount {device}")
    # Installed once, since all forks keep it.
    code = syscalls.filter_of(platform.machine())
    instructions = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    _check(LIBC.prctl(22, 2, header, 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    control = socket.socket(fileno=0)
    gc.freeze()  # a child's collector leaves the shared pages alone
    control.send(b"ready")
    while True:
        request, files, _, _ = socket.recv_fds(control, 16, 3)
        if not request:
            return 0
        if len(files) != 3:
            continue  # the request was to kill a program that had just ended
        pid = os.fork()
        if pid == 0:
            return supervise(control, files, limits)
        for file in files:
            os.close(file)
        if os.waitpid(pid, 0)[1]:
            return 1  # with this process ends the whole sandbox, the orphaned program included


def supervise(control: socket.socket, files: list[int], limits: dict[str, int]) -> int:
    _check(LIBC.unshare(syscalls.NEW_NAMESPACES), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
        fcntl.ioctl(loopback, syscalls.UP, struct.pack("16sH14x", b"lo", 1))  # IFF_UP
    inodes = max(limits["disk_bytes"] // 16384, 64)
    size = f"size={limits['disk_bytes']},nr_inodes={inodes},mode=0700"
    _check(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", 2 | 4, size.encode()), "mount")  # nosuid, nodev
    pid = os.fork()
    if pid == 0:
        terminate(program(files, limits))
    for file in files:
        os.close(file)
    # The program ends, or the parent outside asks to kill it.
    ready = select.select([os.pidfd_open(pid), control.fileno()], [], [])[0]
    if control.fileno() in ready:
        control.recv(16)
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    control.send(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]).encode())
    os._exit(0)


def program(files: list[int], limits: dict[str, int]) -> int:
    """Runs in the child: reads the job from the channel, drops all capabilities, and runs it."""
    os.setsid()  # or signals and priorities for its process group would reach the processes outside
    os.chdir("/tmp")
    # To high numbers first, so that no target closes a descriptor that is still to be moved.
    duplicates = [os.dup2(file, 100 + n) for n, file in enumerate(files)]
    for target, file in zip((CHANNEL, 1, 2), duplicates, strict=True):
        os.dup2(file, target)
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    # A program may not reach the control socket or anything else that this process has open.
    os.closerange(CHANNEL + 1, 1024)
    channel = Channel()
    job = channel.receive()
    if job["stdin"]:
        # A file without a name, since a pipe holds only a short input.
        file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(file, job["stdin"].encode("utf-8", "replace"))
        os.lseek(file, 0, os.SEEK_SET)
        os.dup2(file, 0)
        os.close(file)
    confine(limits)
    random.seed(0)  # the same program, the same end
    channel.send({"confined": True})
    try:
        if job["role"] == "program":
            os.close(CHANNEL)
            load("__main__", job["source"])
        else:
            getattr(calls, job["role"])(channel, load, job)
    except SystemExit as e:
        if isinstance(e.code, int | None):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def terminate(code: int) -> NoReturn:
    """Ends like an interpreter, but without freeing each object, which takes longer than most programs."""
    for exit_hook in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]
        try:
            exit_hook()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = code or 120
    os._exit(code & 255)


def load(name: str, *sources: str) -> ModuleType:
    """Runs a module's sources under a name, each separately, so that each may start with imports from `__future__`."""
    # Libraries such as dataclasses look a module up there by its name.
    module = sys.modules[name] = ModuleType(name)
    for source in sources:
        exec(compile(source, "<answer>", "exec"), module.__dict__)  # noqa: S102
    return module


def confine(limits: dict[str, int]) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"] + limits["own_processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 256),  # counted for the user, also outside
    ):
        resource.setrlimit(kind, (value, value))
    # The header is of version 3, and 24 zero bytes are empty sets of capabilities.
    _check(LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")


def _check(result: int, call: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main())
