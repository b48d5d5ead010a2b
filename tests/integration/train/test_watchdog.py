"""When the watchdog of a phase ends an attempt."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stages.train.watchdog import Watchdog
from tests.fixtures.run_fixtures import RecordingReport


def test_progress_of_one_rank_keeps_the_others_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes for longer than the limit while another waits; once nobody writes, both are found.

    The limit is long, so that no pause of a loaded machine is taken for a hang; then it is short, to be found soon.
    """
    limit = 10.0
    abandoned: set[str] = set()

    def abandon(watchdog: Watchdog) -> None:
        abandoned.add(watchdog.phase)
        watchdog.stop.set()

    monkeypatch.setattr(Watchdog, "_abandon", abandon)
    report = RecordingReport()
    with (
        Watchdog("writing", limit, tmp_path, report) as writing,
        Watchdog("waiting", limit, tmp_path, report) as waiting,
    ):
        for watchdog in (writing, waiting):
            watchdog.alive()
        end = time.monotonic() + 1.2 * limit
        while time.monotonic() < end:
            writing.progress(1)
            assert not abandoned
            time.sleep(0.05)
        for watchdog in (writing, waiting):
            watchdog.limit = 0.1
            watchdog.thread.join(60)
    assert abandoned == {"writing", "waiting"}
