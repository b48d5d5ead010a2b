"""What runs inside bubblewrap: a warm process that forks a fresh, further confined child for each program.

    python -S -s -P inside.py LIMITS_AS_JSON      # fd 0: the control socket; started by stages.rl.sandbox.cell only

This process never runs what a model wrote. A program's child has process, mount and IPC namespaces of its own, of which
it is process 1: when it ends or is killed, everything that it started is dead, and its /tmp is gone. Its supervisor,
outside of those namespaces, tells how it ended; the child has no descriptor through which it could tell so itself.
Standard library only; nothing of this project is to be seen in here.
"""

from __future__ import annotations

import atexit
import ctypes
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
    from stages.rl.sandbox import calls
else:  # inside there is no package, only the file beside this one
    sys.path.insert(0, os.path.dirname(__file__))
    import calls

    sys.path.pop(0)

CHANNEL = 3
LIBC = ctypes.CDLL(None, use_errno=True)

# Of each machine: the audit number, and the calls that a program has no use for: memory that no limit of a process
# counts (shmget, memfd_create ...), what outlives it (keys), and wide doors to the kernel.
DENIED = {
    "x86_64": (0xC000003E, (
        29, 64, 68, 240,  # shmget semget msgget mq_open
        319, 447,  # memfd_create memfd_secret
        248, 249, 250,  # add_key request_key keyctl
        101, 310, 311, 272, 308, 165, 298, 321, 323, 425,  # ptrace process_vm_* unshare setns mount perf bpf uffd uring
    )),
    "aarch64": (0xC00000B7, (
        194, 190, 186, 180,
        279, 447,
        217, 218, 219,
        117, 270, 271, 97, 268, 40, 241, 280, 282, 425,
    )),
}  # fmt: skip


class Channel:
    """Lines of JSON to and from the parent outside."""

    def __init__(self) -> None:
        self.lines = os.fdopen(CHANNEL, "rb", closefd=False)

    def receive(self) -> Any:
        """Raises EOFError when the parent has closed its end."""
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
    control = socket.socket(fileno=0)
    gc.freeze()  # a child's collector leaves the shared pages alone
    control.send(b"ready")
    while True:
        request, files, _, _ = socket.recv_fds(control, 16, 3)
        if not request:
            return 0
        if len(files) != 3:
            continue  # asked to kill a program that had just ended
        pid = os.fork()
        if pid == 0:
            return supervise(control, files, limits)
        for file in files:
            os.close(file)
        if os.waitpid(pid, 0)[1]:
            return 1  # with this process ends the whole sandbox, the orphaned program included


def supervise(control: socket.socket, files: list[int], limits: dict[str, int]) -> int:
    new_namespaces = 0x20000000 | 0x00020000 | 0x08000000  # CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
    _check(LIBC.unshare(new_namespaces), "unshare")
    inodes = max(limits["disk_bytes"] // 16384, 64)
    size = f"size={limits['disk_bytes']},nr_inodes={inodes},mode=0700"
    _check(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", 2 | 4, size.encode()), "mount")  # nosuid, nodev
    pid = os.fork()
    if pid == 0:
        leave(program(files, limits))
    for file in files:
        os.close(file)
    ready = select.select([os.pidfd_open(pid), control.fileno()], [], [])[0]
    if control.fileno() in ready:
        control.recv(16)
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    control.send(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]).encode())
    os._exit(0)


def program(files: list[int], limits: dict[str, int]) -> int:
    """In the child: takes the job from the channel, gives up every right, and runs it."""
    os.chdir("/tmp")
    kept = [os.dup2(file, 100 + n) for n, file in enumerate(files)]
    for target, file in zip((CHANNEL, 1, 2), kept, strict=True):
        os.dup2(file, target)
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    os.closerange(CHANNEL + 1, 1024)
    channel = Channel()
    job = channel.receive()
    if job["stdin"]:
        file = os.memfd_create("stdin")
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
            load(job["source"], "__main__")
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


def leave(code: int) -> NoReturn:
    """Ends as an interpreter would, but for freeing each object one by one, which takes longer than most programs."""
    for last in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]
        try:
            last()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = code or 120
    os._exit(code & 255)


def load(source: str, name: str) -> ModuleType:
    """Runs a module's source under a name."""
    module = sys.modules[name] = ModuleType(name)
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
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    _check(LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")
    if platform.machine() in DENIED:
        _deny(*DENIED[platform.machine()])


def _deny(machine: int, numbers: tuple[int, ...]) -> None:
    """A seccomp filter: these calls fail with EPERM, every call of another machine kills."""
    load_word, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    code = [(load_word, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, 0x80000000), (load_word, 0, 0, 0)]
    code += [(at_least, len(numbers) + 1, 0, 0x40000000)]  # x32's numbers, which name the same calls
    code += [(equal, len(numbers) - n, 0, number) for n, number in enumerate(numbers)]
    code += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050001)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    _check(LIBC.prctl(22, 2, header, 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main())
