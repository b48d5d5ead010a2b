"""Sandboxes that die or cannot start: the program, the machine or nobody is to blame."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.rl import sandbox
from stages.rl.sandbox import ATTEMPTS, Pool, Program, SandboxFailed, limits, missing
from stages.rl.sandbox.cell import Cell
from tests.fixtures.sandbox_fixtures import LIMITS, NEEDS_BUBBLEWRAP

pytestmark = NEEDS_BUBBLEWRAP


def test_a_cell_that_is_killed_starts_again() -> None:
    with Pool(1) as pool:
        (cell,) = pool._cells[0]
        cell.run(Program("pass"))
        before = cell.pid
        assert before
        os.kill(before, 9)
        os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)  # a kill takes effect at some later time
        assert pool.run([Program("print('again')")])[0].stdout == "again\n" and cell.pid != before
        killer = threading.Timer(0.5, lambda: os.kill(cell.pid or 0, 9))
        killer.start()
        assert pool.run([Program("import time; time.sleep(1.5); print('to its end')")])[0].stdout == "to its end\n"


def killing(times: int, attempts: list[int]) -> Callable[[list[Cell], int], str]:
    """Work on an item that kills its cell in its first attempts, if the item is 3."""

    def work(cells: list[Cell], item: int) -> str:
        if item == 3:
            attempts.append(item)
        kills = item == 3 and len(attempts) <= times
        seconds = 9 if kills else 0.1  # it must not end before it is killed
        job = {"role": "program", "source": f"import time; time.sleep({seconds}); print({item})"}
        with cells[0].begin(job) as running:
            if kills:
                os.kill(cells[0].pid or 0, 9)
            return running.finish().stdout.strip()

    return work


def test_what_kills_its_sandbox_each_time_is_to_blame_and_nothing_else_is() -> None:
    attempts: list[int] = []
    with Pool(2, LIMITS) as pool:
        outcome = pool.map(killing(99, attempts), range(6), lambda item: f"blamed: {item}")
        assert outcome == ["0", "1", "2", "blamed: 3", "4", "5"] and len(attempts) == ATTEMPTS
        attempts.clear()
        outcome = pool.map(killing(ATTEMPTS - 1, attempts), range(6), lambda item: f"blamed: {item}")
        assert outcome == ["0", "1", "2", "3", "4", "5"], "killed from outside, and not each time"


def test_a_machine_where_each_sandbox_dies_is_no_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(1, LIMITS) as pool:
        (cell,) = pool._cells[0]
        begin = cell.begin

        def begin_and_die(job: Any) -> Any:
            running = begin(job)
            os.killpg(cell.pid, 9)  # before anything is read of it
            return running

        with monkeypatch.context() as patched:
            patched.setattr(cell, "begin", begin_and_die)
            with pytest.raises(SandboxFailed):
                pool.run([Program("import time; time.sleep(5)")])
        assert pool.run([Program("print('mended')")])[0].stdout == "mended\n"


def test_a_probe_that_does_not_get_its_memory_blames_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.cell, "OWN_MEMORY", -(200 << 20))  # less than a program may use is there
    if os.geteuid():
        pytest.skip("only a control group, which takes root, bounds it")
    with Pool(1, LIMITS) as pool, pytest.raises(SandboxFailed, match=f"the sandbox fails {ATTEMPTS} times, and then"):
        pool.map(killing(99, []), [3], str)


def test_a_missing_requirement_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in str(missing())
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert str(missing()).startswith(
        "the sandbox cannot start: bwrap: No permissions to create new namespace; user namespaces are needed"
    )
    with Pool(1) as pool, pytest.raises(SandboxFailed):
        pool.run([Program("pass")])


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("bwrap: Creating new namespace failed", "docs/sandbox.md"),
        ("bwrap: No permissions", "docs/sandbox.md"),
        ("bwrap: setting up uid map: Permission denied", "docs/sandbox.md"),
        ("bwrap: Unknown option --disable-userns", "bubblewrap 0.8 or newer is needed"),
        ("bwrap: Can't mkdir: No space left on device", "No space left on device"),
    ],
)
def test_a_bubblewrap_that_does_not_work_is_reported_with_what_to_set(
    error: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bwrap").write_text(f'#!/bin/sh\necho "{error}" >&2; exit 1\n')
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert str(missing()).startswith(f"the sandbox cannot start: {error}") and str(missing()).endswith(remedy)


def test_root_is_refused_without_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(limits, "homes", lambda mounts, membership: {})
    assert "pids.max" in str(missing())
