"""Limits of a program in the sandbox: processes, memory, disk, open files, output and time."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import os
import time

import pytest

from stages.rl.sandbox import Limits, Program
from stages.rl.sandbox.cell import OWN_PROCESSES, Cell
from tests.fixtures.sandbox_fixtures import LIMITS, NEEDS_BUBBLEWRAP, Run, cell, copy, run  # noqa: F401 - fixtures

pytestmark = NEEDS_BUBBLEWRAP


def test_forks_stop_at_the_limit(run: Run) -> None:
    count = (
        "import os, time\nn = 0\ntry:\n    while n < 2000:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\n"
    )
    outcome = run(count + "except OSError as e: print(n, type(e).__name__)")
    forks, error = outcome.stdout.split()
    assert error == "BlockingIOError" and 10 <= int(forks) < 16 + OWN_PROCESSES
    threads = "import threading, time\nn = 0\ntry:\n    while n < 2000:\n        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n        n += 1\nexcept RuntimeError: print(n)"
    assert 10 <= int(run(threads).stdout) < 16 + OWN_PROCESSES


def test_a_fork_bomb_is_ended_and_leaves_nothing(run: Run) -> None:
    start = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, cpu_seconds=1, wall_seconds=3).status == "timeout"
    assert time.monotonic() - start < 30
    assert run("print('fine')").stdout == "fine\n"


def test_memory_of_a_process(run: Run) -> None:
    outcome = run("x = bytearray(300 << 20)")
    assert outcome.status == "memory" and "MemoryError" in outcome.stderr
    assert run("x = bytearray(100 << 20); print(len(x))").stdout == f"{100 << 20}\n"


def test_memory_of_all_processes_together(cell: Cell) -> None:
    if os.geteuid():
        pytest.skip("only a control group, which takes root, bounds it")
    hungry = "import os, time\nfor n in range(8):\n    if os.fork() == 0:\n        x = b'x' * (120 << 20); time.sleep(1); os._exit(0)\n"
    outcome = cell.run(Program(hungry + "print(sorted({os.wait()[1] for _ in range(8)}))"))
    # the kernel killed some, or all with their first process: 8 times 120 MiB never fitted 256
    assert outcome.status == "memory" or "9" in outcome.stdout, outcome
    assert cell.run(Program("print('fine')")).stdout == "fine\n"


def test_memory_that_no_process_is_charged_for_is_denied(run: Run) -> None:
    tries = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())\ntry: os.memfd_create('x')\nexcept PermissionError: print('denied')"
    assert run(tries).stdout == "-1 1\ndenied\n"


def test_disk(run: Run) -> None:
    one = "n = 0\ntry:\n    with open('/tmp/one', 'wb', 0) as f:\n        while True: n += f.write(bytes(1 << 16))\nexcept OSError as e: print(n, e.errno)"
    assert run(one).stdout == f"{4 << 20} 27\n", "a file ends at its limit, EFBIG"
    many = "n = 0\ntry:\n    for i in range(99):\n        with open(f'/tmp/{i}', 'wb', 0) as f:\n            for _ in range(16): n += f.write(bytes(1 << 16))\nexcept OSError as e: print(n, e.errno)"
    written, error = map(int, run(many).stdout.split())
    assert (15 << 20) <= written <= (16 << 20) and error == 28, "the disk ends at its limit, ENOSPC"
    empty = (
        "n = 0\ntry:\n    while True: open(f'/tmp/{n}', 'w').close(); n += 1\nexcept OSError as e: print(n, e.errno)"
    )
    count, error = map(int, run(empty).stdout.split())
    assert count < 2000 and error == 28, "and so do files"


def test_files_that_may_be_open(run: Run) -> None:
    many = "files = []\ntry:\n    while True: files.append(open('/dev/null'))\nexcept OSError as e: print(len(files), e.errno)"
    count, error = map(int, run(many).stdout.split())
    assert 50 <= count < 64 and error == 24


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(run: Run, stream: str) -> None:
    outcome = run(f"import sys\nwhile True: print('x' * 999, file=sys.{stream})")
    assert outcome.status == "output" and len(getattr(outcome, stream)) == LIMITS.output_bytes


def test_endless_computing_is_ended_by_the_processor_time_it_takes(run: Run) -> None:
    outcome = run("while True: pass", cpu_seconds=1, wall_seconds=60)
    assert outcome.status == "timeout" and 0.5 <= outcome.cpu_seconds < 2


def test_sleep_is_ended_by_the_clock(run: Run) -> None:
    stubborn = (
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)"
    )
    start = time.monotonic()
    outcome = run(stubborn, wall_seconds=1)
    assert outcome.status == "timeout" and outcome.cpu_seconds < 0.5 and time.monotonic() - start < 30


def test_by_default_the_clock_is_far_from_what_decides() -> None:
    assert Limits().wall_seconds >= 10 * Limits().cpu_seconds
