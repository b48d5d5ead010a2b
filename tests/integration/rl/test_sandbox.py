"""Programs in the sandbox: what they get, how they end, and what they leave behind, which is nothing."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from stages.rl.sandbox import Outcome, Pool, Program, limits
from stages.rl.sandbox.cell import Cell
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP, ROOT, Run, alive, cell, copy, run, until  # noqa: F401 - fixtures

pytestmark = NEEDS_BUBBLEWRAP


def test_a_program_runs(run: Run) -> None:
    assert run("print(6 * 7)") == Outcome("ok", "42\n", "", 0, pytest.approx(0, abs=1))  # type: ignore[arg-type]
    broken = run("import sys; print('so far'); 1 / 0")
    assert (broken.status, broken.stdout, broken.exit_code) == ("error", "so far\n", 1)
    assert "ZeroDivisionError" in broken.stderr


def test_programs_end_as_they_say(cell: Cell) -> None:
    assert cell.run(Program("import sys; sys.exit(7)")).exit_code == 7
    assert cell.run(Program("raise SystemExit('why')")).stderr == "why\n"
    assert cell.run(Program("import atexit; atexit.register(print, 'last')")).stdout == "last\n"
    assert cell.run(Program("import ctypes; ctypes.string_at(0)")).status == "killed"
    assert cell.run(Program("def f(")).status == cell.run(Program("\udcff\0")).status == "error"


def test_no_inherited_descriptors(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the host's")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        attack = "import os\nfor n in range(4096):\n    try: os.fstat(n)\n    except OSError: continue\n    print(n)"
        assert run(attack, output_bytes=4096).stdout.split() == ["0", "1", "2"]


def test_a_daemon_dies_with_its_program(run: Run) -> None:
    marker = f"marker-{uuid.uuid4()}"
    daemon = f"""
import os, signal, sys, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    for s in set(signal.Signals) - {{9, 19}}: signal.signal(s, signal.SIG_IGN)
    if os.fork() == 0:
        os.set_inheritable(w, True)
        os.execv(sys.executable, [sys.executable, '-c', f'import os, time; os.write({{w}}, b"x"); time.sleep(99)', '{marker}'])
    os._exit(0)
os.read(r, 1)
time.sleep(float('SECONDS'))
"""
    counts: list[int] = []
    waiter = threading.Thread(target=lambda: counts.append(len(until(lambda: alive(marker)))))
    waiter.start()
    assert run(daemon.replace("SECONDS", "1")).status == "ok"
    waiter.join()
    assert counts[0], "it did run"
    assert not alive(marker)
    assert run(daemon.replace("SECONDS", "99"), wall_seconds=2).status == "timeout"
    assert not alive(marker)


def test_nothing_passes_from_one_program_to_the_next(cell: Cell) -> None:
    """In the same cell, whose warm process stays the same one."""
    cell.run(Program("pass"))
    before = cell.pid
    poison = """
import builtins, ctypes, json, os, random, signal, socket, sys
open('/tmp/left', 'w').write('x')
json.dumps = builtins.len = builtins.print = sys.exit = lambda *a, **k: 'poisoned'
s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'left'); s.listen()
if os.fork() == 0:
    os.setsid()
    while True: signal.pause()
for pid in [0, -1, *range(2, 200)]:
    try: os.kill(pid, 9)
    except OSError: pass
for path in ('/atom/inside.py', '/atom/syscalls.py', sys.executable, json.__file__):
    for way in ('w', 'a'):
        try: open(path, way)
        except OSError: continue
        os.write(1, b'changed ' + path.encode())
libc = ctypes.CDLL(None)
libc.prctl(1, 0); libc.prctl(4, 1)
random.seed(5)
"""
    assert cell.run(Program(poison)).stdout == ""
    look = """
import json, os, random, socket
print(os.listdir('/tmp'), json.dumps([1]), len('ab'), os.getpid(), random.randrange(10 ** 9), hash('text'))
for pid in range(2, 200):
    try: os.kill(pid, 0); print('alive', pid)
    except ProcessLookupError: pass
try: socket.socket(socket.AF_UNIX).connect(chr(0) + 'left'); print('reached')
except ConnectionRefusedError: pass
"""
    first = cell.run(Program(look)).stdout
    assert first.startswith("[] [1] 2 1 ") and first.count("\n") == 1, first
    assert cell.run(Program(look)).stdout == first, "the same program gives the same, chance and hashes included"
    assert cell.pid == before


def test_nothing_outlives_its_parent() -> None:
    marker = f"marker-{uuid.uuid4()}"
    program = (
        f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)', '{marker}'])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from stages.rl.sandbox import *\nwith Pool(1) as p: p.run([Program({program!r})])"],
        cwd=ROOT,
    )
    inside = [pid for pid in until(lambda: [p for p in alive(marker) if p != parent.pid])]
    assert inside
    parent.kill()
    parent.wait()
    assert until(lambda: not set(alive(marker)) & set(inside))
    if os.geteuid() == 0:
        assert until(lambda: not left_after_another(parent.pid)), "the next sandbox removes its empty control groups"


def left_after_another(pid: int) -> list[Path]:
    with Pool(1) as pool:
        pool.run([Program("pass")])
    return [f for c in limits.FILES for f in Path("/sys/fs/cgroup").glob(f"{c}/**/{limits.PREFIX}{pid}-*")]
