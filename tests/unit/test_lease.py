"""Leases: one holder at a time, successors after death or expiry, and the old holder learns of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import lease as module
from pipeline.core.lease import EXPIRY, Lease, holder

HOLD = "import sys,time; from pathlib import Path; from pipeline.core.lease import Lease; \
l=Lease.take(Path(sys.argv[1])); print('held' if l else 'refused', flush=True); time.sleep(60 if l else 0)"


def start_holder(folder: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


def test_a_second_process_is_refused_until_release(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    assert lease and start_holder(tmp_path)[1] == "refused"
    lease.release()
    process, first_line = start_holder(tmp_path)
    process.kill()
    process.wait()
    assert first_line == "held"


def test_a_killed_holder_is_succeeded_at_once_on_its_own_host(tmp_path: Path) -> None:
    process, first_line = start_holder(tmp_path)
    assert first_line == "held" and Lease.take(tmp_path) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    lease = Lease.take(tmp_path)
    assert lease and lease.number == 2
    lease.release()


def test_a_silent_holder_elsewhere_is_succeeded_after_expiry_and_learns_of_it(tmp_path: Path) -> None:
    old = Lease.take(tmp_path)
    assert old
    record = json.loads(old.path.read_text())
    old.path.write_text(json.dumps({**record, "host": "another-host"}))
    assert Lease.take(tmp_path) is None, "a fresh lease of another host counts, whatever its process number"
    os.utime(old.path, (time.time() - EXPIRY - 1,) * 2)
    new = Lease.take(tmp_path)
    assert new and old.lost and not new.lost
    old.release()
    present = holder(tmp_path)
    assert present and present.number == new.number and present.alive, "the old one cannot release the new one's lease"
    new.release()


def test_a_file_system_that_is_away_for_a_moment_loses_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a sign of life nor a look at the lease ends the thread; a lease that cannot be released expires."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    failures = iter([errno.EIO, errno.ESTALE, errno.EROFS] * 4)
    real_time, real_look = os.utime, Path.lstat

    def fails(real: Any) -> Any:
        def call(path: Any, *args: Any) -> Any:
            if Path(path).name.startswith("lease.") and (number := next(failures, None)):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args)

        return call

    lease = Lease.take(tmp_path)
    assert lease
    lost_event = threading.Event()
    lease.on_lost = lost_event.set
    monkeypatch.setattr(os, "utime", fails(real_time))
    monkeypatch.setattr(Path, "lstat", fails(real_look))
    until = time.monotonic() + 30
    while next(failures, None) is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert lease._thread.is_alive() and not lost_event.is_set()
    real_time(lease.path, (1, 1))
    while real_look(lease.path).st_mtime == 1:
        assert time.monotonic() < until, "it beats again"
        time.sleep(0.01)
    (tmp_path / "lease.2").touch()
    assert lost_event.wait(30), "and sees a successor"
    failures = iter([errno.EIO] * 9)
    lease.release()


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    assert lease
    lease.path.write_text(json.dumps({**json.loads(lease.path.read_text()), "start": "1"}))
    present = holder(tmp_path)
    assert present and not present.alive


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    first_lines = [r.stdout.readline().strip() for r in racers if r.stdout]
    for r in racers:
        r.kill()
        r.wait()
    assert sorted(first_lines) == ["held"] + ["refused"] * 7


def test_a_lease_cut_by_a_crash_counts_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "lease.1").touch()
    assert Lease.take(tmp_path) is None
    os.utime(tmp_path / "lease.1", (time.time() - EXPIRY - 1,) * 2)
    lease = Lease.take(tmp_path)
    assert lease and lease.number == 2
    lease.release()
