"""The process inside bubblewrap: it stays warm and forks a further confined child for each program.

    python -S -s -P inside.py LIMITS_AS_JSON      # fd 0: the control socket; started by stages.rl.sandbox.cell only

This process never runs model-written code. A program's child has process, mount, IPC and network namespaces of its own
and is process 1 and leader of a session there: it can signal no process outside, and when it ends or is killed, all its
children are dead, and its /tmp and its sockets are gone. Its supervisor, outside of those namespaces, reports its end;
the child has no descriptor for doing so itself. Standard library only; of this project, only the files beside it are
visible here.

A check and the answer that it tests run in two sandboxes, and only plain data passes between them, as JSON: None, bool,
int, float, str and list unchanged, and {kind: parts} for tuple, set, frozenset, dict, bytes, complex and a long int. A
subclass (an Enum of strings) passes as its plain value. An object of any other class does not pass, so no object with
its own comparison is compared with an expected value.
"""

from __future__ import annotations

import atexit
import builtins
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
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from stages.rl.sandbox import syscalls
    from stages.rl.sandbox.limits import Job
else:  # inside there is no package, only the files beside this one
    sys.path.insert(0, os.path.dirname(__file__))
    import syscalls

    sys.path.pop(0)

# Descriptor of the channel in a program's child.
CHANNEL = 3
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LIBC = ctypes.CDLL(None, use_errno=True)
# The function that returns the plain value of a subclass, without its methods.
PLAIN: list[tuple[type, Callable[[Any], Any]]] = [(int, int.__int__), (float, float.__float__), (str, str.__str__)]
COLLECTIONS: dict[str, type[Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
# Bits of an int beyond which it is sent as hexadecimal digits: decimal ones take quadratic time, and Python reads at
# most 4300.
LONG = 14_000


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
    confine(limits)
    random.seed(0)  # the same program, the same end
    channel.send({"confined": True})
    roles = {"answer": answer, "check": check}
    try:
        if job["role"] == "program":
            os.close(CHANNEL)
            load("__main__", job["source"])
        else:
            roles[job["role"]](channel, job)
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


def encode(value: Any) -> Any:
    """Encodes a value.

    Raises:
        TypeError: The value is not plain data.
    """
    # Before int, of which bool is a subclass.
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in PLAIN:
        if isinstance(value, kind):
            value = plain(value)
            return {"int": hex(value)} if kind is int and value.bit_length() > LONG else value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [encode(v) for v in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(value: Any) -> Any:
    """Decodes a value. Raises TypeError or ValueError for anything but output of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    # Any other number of entries is a ValueError.
    ((kind, parts),) = value.items()
    if kind == "dict":
        return {decode(k): decode(v) for k, v in parts}
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](decode(v) for v in parts)
    if kind == "int":
        return int(parts, 16)
    if kind == "bytes":
        return bytes.fromhex(parts)
    if kind == "complex":
        return complex(*parts)
    raise ValueError(f"unknown kind {kind}")


def answer(channel: Channel, job: Job) -> None:
    """Loads the answer, then calls its function on request. The answer can only change its own return values here."""
    module = load("answer", job["prelude"], job["source"])
    channel.send({"loaded": True})
    while True:
        try:
            call = channel.receive()
        except EOFError:
            return
        try:
            args, kwargs = decode(call["call"])
            channel.send({"value": encode(getattr(module, job["entry_point"])(*args, **kwargs))})
        except Exception as e:
            channel.send({"raised": describe_exception(e)})


def describe_exception(e: Exception) -> list[Any]:
    """Returns the exception's builtin classes, nearest first, its text, and its arguments if plain and short."""
    names = [kind.__name__ for kind in type(e).__mro__ if kind.__module__ == "builtins"]
    text = ""
    try:
        text = str(e)[:500]
        arguments = encode(list(e.args))
    except Exception:  # its own methods are the answer's, and may raise anything
        arguments = [text]
    return [names, text, arguments if len(ascii(arguments)) <= 16384 else [text]]


def rebuild_exception(names: list[str], text: str, arguments: Any) -> Exception:
    """Returns the exception of an answer as the nearest builtin one.

    For any message of the answer, it has a class of this process and plain data. It is never a StopIteration, which
    would end a loop of the check, and with it the check.
    """
    stops = (StopIteration, StopAsyncIteration)
    for kind in (*(getattr(builtins, str(name), None) for name in names), Exception):
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, stops):
            for parts in (decode(arguments), [text]):
                try:
                    e = kind(*parts)
                    if parts == [text] or str(e)[:500] == text:
                        return e
                except (TypeError, ValueError, RecursionError):  # a UnicodeDecodeError is made of five parts
                    continue
    return Exception(text)


def check(channel: Channel, job: Job) -> None:
    """Runs `check(candidate)` of a trusted source, where candidate, also under its own name, calls the other sandbox.

    The last line is the verdict: true, false, or null with a reason if the row is broken.
    """
    unsuited: list[str] = []
    calls = 0

    def candidate(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            call = encode([list(args), kwargs])
        except TypeError as e:
            unsuited.append(f"its check passes what cannot leave a process: {e}")
            raise
        channel.send({"call": call})
        reply = channel.receive()
        if "raised" in reply:
            raise rebuild_exception(*reply["raised"])
        return decode(reply["value"])

    try:
        module = load("check", job["prelude"], job["source"])
        # Some checks call the function by its own name.
        setattr(module, job["entry_point"], candidate)
        function = module.check
    except Exception as e:
        channel.send({"verdict": None, "reason": f"its check does not load: {type(e).__name__}: {e}"})
        return
    try:
        function(candidate)
        verdict = True
    except Exception:
        verdict = False
    if not calls:
        # Such a check would pass any answer.
        unsuited.append("its check never calls the candidate")
    channel.send({"verdict": None, "reason": unsuited[0]} if unsuited else {"verdict": verdict})


if __name__ == "__main__":
    sys.exit(main())
