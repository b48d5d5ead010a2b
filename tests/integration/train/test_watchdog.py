"""What the watchdog of a phase writes in which order, and how long NCCL's recorder may take. The recorder itself needs a
GPU: other functions are in its place."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.train.watchdog import Watchdog
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import RecordingReport


def test_the_place_of_a_rank_is_written_before_the_recorder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else rank 0 would take a rank with a slow recorder for one that is gone."""

    def write(folder: Path, rank: int) -> Path:
        assert (folder / f"rank-{rank:05d}.json").exists()
        assert "pretrain; the stacks of all ranks are in the log" in capsys.readouterr().err
        return folder

    monkeypatch.setattr("stages.train.watchdog.write_collectives", write)
    text = Watchdog("pretrain", 1.0, tmp_path, RecordingReport())._stacks()
    assert text == f"; the stacks of all ranks are in the log; what NCCL recorded is in {tmp_path / 'stacks'}"


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


def test_a_recorder_that_hangs_with_the_interpreter_ends_the_process(tmp_path: Path) -> None:
    program = (
        "import ctypes, sys; from pathlib import Path; from stages.train import watchdog; watchdog.RECORDER_SECONDS = 1\n"
        "watchdog._write_in_time(lambda: b'soon', Path(sys.argv[1]))\n"
        "watchdog._write_in_time(lambda: ctypes.PyDLL(None).sleep(300), Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "nccl-rank-0")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == 1 and "Timeout (0:00:01)!" in process.stderr
    assert (tmp_path / "nccl-rank-0").read_bytes() == b"soon"
