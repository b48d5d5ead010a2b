"""Runs a function of ours on a stranger's bytes in a process of its own, with an end.

Parsers of Parquet, YAML, certificates or templates promise neither time nor memory. The child may use so much processor
time, so much memory beyond what it begins with, and so many seconds in all; whatever it needs beyond that ends it, and
becomes a sentence.
"""

from __future__ import annotations

import faulthandler
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

WAITING = 10
"""Seconds on the clock for each second of processor time: other processes need theirs, too."""


@dataclass(frozen=True)
class Budget:
    """memory: bytes beyond those that are in use at the start; seconds: of processor time."""

    memory: int
    seconds: float


def run(call: Callable[[], Any], budget: Budget) -> tuple[Any, float]:
    """What `call` returns, which must be JSON, and the processor time that it took. It sees this process as it is, and
    changes nothing in it. Raises CheckFailed if the budget does not suffice, or if the child is killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(call, budget, write_end)
    os.close(write_end)
    data = None
    try:
        data = _receive(read_end, time.monotonic() + 10 + WAITING * budget.seconds)
    finally:
        os.close(read_end)
        if data is None:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if data is None:
        raise CheckFailed(f"does not end within {10 + WAITING * budget.seconds:.0f} s")
    if not data.endswith(b"\n"):
        raise CheckFailed(_reason(os.waitstatus_to_exitcode(status), budget))
    body = json.loads(data)
    if "bug" in body:
        raise RuntimeError(body["bug"])
    if "memory" in body:
        raise CheckFailed(_too_large(budget))
    return body["value"], usage.ru_utime + usage.ru_stime


def _receive(descriptor: int, deadline: float) -> bytes | None:
    """All that the child sends; None if it does not end in time."""
    parts: list[bytes] = []
    while (remaining := deadline - time.monotonic()) > 0 and select.select([descriptor], [], [], remaining)[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _child(call: Callable[[], Any], budget: Budget, write_end: int) -> None:
    """Never returns."""
    body: dict[str, Any]
    try:
        _limit(budget)
        body = {"value": call()}
    except MemoryError:
        body = {"memory": True}
    except BaseException:  # an error of ours: the parent raises it
        body = {"bug": traceback.format_exc()}
    try:
        with os.fdopen(write_end, "wb") as file:
            file.write(json.dumps(body).encode() + b"\n")
    finally:
        os._exit(0)


def _limit(budget: Budget) -> None:
    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a library that dies has much to say
        os.dup2(null, descriptor)
    if torch := sys.modules.get("torch"):  # its threads were not copied
        torch.set_num_threads(1)
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.set_cpu_count(1)
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve a gigabyte at once
    set_limits(budget)


def set_limits(budget: Budget) -> None:
    """Limits this process."""
    seconds = max(1, round(budget.seconds + time.process_time()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    data_limit = _data_bytes() + budget.memory
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_limit = data_limit if hard == resource.RLIM_INFINITY else min(data_limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))


def _data_bytes() -> int:
    """Memory of this process that is its own and can be written, which RLIMIT_DATA counts."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


def _reason(code: int, budget: Budget) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"does not end within {budget.seconds:.0f} s of processor time"
    if code == -signal.SIGABRT:
        return _too_large(budget)
    if code < 0:
        return f"ends by {signal.Signals(-code).name} in the library that reads it"
    return "ends without a result in the library that reads it"


def _too_large(budget: Budget) -> str:
    return f"needs more than {budget.memory >> 20} MB of memory"
