"""Runs a function on untrusted bytes in a separate process with limits on time and memory.

Parsers of Parquet, YAML, certificates or templates have no bounds on time and memory. A child that exceeds its limit of
processor time, additional memory or wall-clock time is ended, and the error is one sentence.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import CheckFailed

STATUS = "/proc/self/status"
WAITING = 5
"""Wall-clock seconds for each second of processor time, because other processes use the processor as well."""


@dataclass(frozen=True)
class Budget:
    """The limits of a call.

    Attributes:
        memory: Bytes beyond those in use at the start.
        seconds: Seconds of processor time.
    """

    memory: int
    seconds: float


def missing() -> str:
    """Returns the name of what this platform lacks for limits on a child; "" on Linux."""
    return "" if os.path.exists(STATUS) else f"{STATUS}, which Linux has"


def run(call: Callable[[], Any], budget: Budget) -> tuple[Any, float]:
    """Returns the result of `call`, which must be JSON, and its processor time.

    The call runs in a fork: it sees the state of this process and does not change it. Raises CheckFailed if the
    budget does not suffice, or if the child is killed.

    Where `missing` names something, the call runs in this process, without limits, in no time.
    """
    if missing():
        return call(), 0.0
    # Else the child would write the buffered text of its parent a second time.
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(call, budget, write_end)
    os.close(write_end)
    # Stays None if this process is interrupted while it waits; the child is then killed as well.
    data = None
    try:
        data = _receive(read_end, time.monotonic() + 10 + WAITING * budget.seconds)
    finally:
        os.close(read_end)
        if data is None:
            # A child that is late may ignore every other signal.
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if data is None:
        raise CheckFailed(f"does not end within {10 + WAITING * budget.seconds:.0f} s")
    # The line feed is written last: without it the child ended in the middle of its answer.
    if not data.endswith(b"\n"):
        raise CheckFailed(_reason(os.waitstatus_to_exitcode(status), budget))
    body = json.loads(data)
    # An error of this program, and not a finding about the file.
    if "bug" in body:
        raise RuntimeError(body["bug"])
    if "memory" in body:
        raise CheckFailed(_too_large(budget))
    return body["value"], usage.ru_utime + usage.ru_stime


def _receive(descriptor: int, deadline: float) -> bytes | None:
    """Returns all output of the child; None if it does not end in time."""
    parts: list[bytes] = []
    while (remaining := deadline - time.monotonic()) > 0 and select.select([descriptor], [], [], remaining)[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _child(call: Callable[[], Any], budget: Budget, write_end: int) -> None:
    """Runs `call` in the child process, sends its result to the parent, and ends the process; never returns."""
    body: dict[str, Any]
    gc.freeze()  # collections in the child do not end objects of its parent, whose threads it has not, and are quick
    try:
        _limit(budget)
        body = {"value": call()}
    except MemoryError:
        body = {"memory": True}
    except BaseException:  # an AtomError: the parent raises it
        body = {"bug": traceback.format_exc()}
    try:
        with os.fdopen(write_end, "wb") as file:
            file.write(json.dumps(body).encode() + b"\n")
    finally:
        # No handler of the parent may run in the child: it shares its files and temporary folders.
        os._exit(0)


def _limit(budget: Budget) -> None:
    faulthandler.disable()
    # The handlers are the parent's, and would do its cleaning up in the child.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a crashing library prints much
        os.dup2(null, descriptor)
    if torch := sys.modules.get("torch"):  # the fork has none of its threads
        torch.set_num_threads(1)
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.set_cpu_count(1)
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve a gigabyte at once
    set_limits(budget)


def set_limits(budget: Budget) -> None:
    """Limits this process."""
    # The limit counts from the start of the process, so what it has used already is added.
    seconds = max(1, round(budget.seconds + time.process_time()))
    # A library that crashes on a crafted file must not leave a large core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The soft limit sends a signal that a process may ignore; the hard one, a second later, kills it.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    # What is in use at the fork belongs to the parent and is not the fault of the file.
    data_limit = _data_bytes() + budget.memory
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_limit = data_limit if hard == resource.RLIM_INFINITY else min(data_limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))


def _data_bytes() -> int:
    """Returns the private writable memory of this process, which RLIMIT_DATA counts."""
    with open(STATUS) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


def _reason(code: int, budget: Budget) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"does not end within {budget.seconds:.0f} s of processor time"
    # Libraries in C++ abort when they get no memory.
    if code == -signal.SIGABRT:
        return _too_large(budget)
    if code < 0:
        return f"ends by {signal.Signals(-code).name} in the library that reads it"
    return "ends without a result in the library that reads it"


def _too_large(budget: Budget) -> str:
    return f"needs more than {budget.memory >> 20} MB of memory"
