"""The live view of a run in a terminal, and the summaries that keep its cost small."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli.tables import status_table
from pipeline.core import log_summary
from pipeline.core.errors import Failure, Kind
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.log_summary import SummaryWriter
from pipeline.tracking import status
from tests.fixtures import home_fixtures, live_fixtures
from tests.fixtures.live_fixtures import make_run, train
from tests.fixtures.run_fixtures import atom

PRICES = {"gpu_hour": 2.5, "core_hour": 0.01, "currency": "EUR"}


def test_a_snapshot_has_hours_and_money(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, 800, prices=PRICES)
    lease = Lease.take(store.work("pretrain-0123456789ab"))
    assert lease is not None
    try:
        current = status.take(run, store)
    finally:
        lease.release()
    assert 16 * 1600 / 3600 < current.used["gpu_hours"] < 16 * 1700 / 3600
    assert str(status_table(current).caption).endswith(" EUR")


def test_a_running_stage_keeps_its_summaries_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_summary, "SAVE_EVERY", 0.05)
    run, _ = make_run(tmp_path, 10)
    folder = run.node_folder("pretrain")

    def offset() -> int:
        path = folder / "events.summary.json"
        return int(json.loads(path.read_text())["offset"]) if path.exists() else 0

    writer = SummaryWriter(folder)
    try:
        wait_for(lambda: offset() == (folder / "events.jsonl").stat().st_size)
        for step in range(11, 21):
            train(folder, time.time(), step, 3.0)
        wait_for(lambda: offset() == (folder / "events.jsonl").stat().st_size)
    finally:
        writer.close()
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_a_summary_that_cannot_be_written_never_reaches_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_summary, "SAVE_EVERY", 0.05)
    run, _ = make_run(tmp_path, 10)
    (run.node_folder("pretrain") / "metrics.summary.json").mkdir()
    report, writer = FileReport(run.node_folder("pretrain")), SummaryWriter(run.node_folder("pretrain"))
    time.sleep(0.4)
    report.end(Failure("it failed", Kind.MACHINE))
    writer.close()
    report.close()
    assert (run.node_folder("pretrain") / "events.jsonl").read_text().splitlines()[-1].count("it failed") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "summaries" in line]
    assert len(lines) == 1 and "the stage goes on" in lines[0], lines


def test_a_run_leaves_summaries_and_to_look_writes_nothing(tmp_path: Path) -> None:
    composed = home_fixtures.graphs(tmp_path)[0]
    home = tmp_path / "home"
    atom(home, "run", str(composed.recipe.path), "--until", "acquire-sums")
    (summary,) = home.glob("logs/*/acquire-sums/events.summary.json")
    assert json.loads(summary.read_text())["state"]["starts"] == 1
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    atom(home, "status", "--watch")
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_status_knows_the_run_and_watching_ends_with_it(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    body = json.loads(atom(tmp_path, "status", live_fixtures.RUN, "--json").stdout)
    assert [stage["state"] for stage in body["stages"]] == ["waiting", "failed", "waiting"]
    shown = atom(tmp_path, "status", live_fixtures.RUN, "--watch").stdout
    assert "its process is gone" in shown and "used so far: " in shown
