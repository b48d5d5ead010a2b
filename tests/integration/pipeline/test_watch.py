"""Alerts on a run from outside of its jobs, by a real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.core.lease import Lease
from pipeline.operations import alerts
from pipeline.operations.alerts import Alert, Thresholds, Watcher
from pipeline.tracking import status
from tests.fixtures.live_fixtures import RUN, append, make_run, train
from tests.fixtures.run_fixtures import atom

KEY = "pretrain-0123456789ab"


@contextmanager
def running(home: Path) -> Iterator[None]:
    lease = Lease.take(home / "work" / KEY)
    assert lease is not None
    try:
        yield
    finally:
        lease.release()


def kinds(home: Path, limits: Thresholds | None = None, **fields: object) -> list[str]:
    run, store = make_run(home, **fields)  # type: ignore[arg-type]
    with running(home):
        return [alert.kind for alert in alerts.alerts(status.take(run, store), store, limits or Thresholds(free_gb=0))]


def test_a_healthy_run_raises_no_alert(tmp_path: Path) -> None:
    assert kinds(tmp_path, steps=300, budget={"gpu_hours": 1e6, "core_hours": None}) == []


def test_a_stage_without_a_step_has_stalled(tmp_path: Path) -> None:
    """Twenty steps of two seconds are less than the least time; with that lowered they are the limit."""
    assert kinds(tmp_path / "a", steps=30, ago=200) == []
    assert kinds(tmp_path / "b", steps=30, ago=400) == ["stalled"]
    few = Thresholds(stalled_seconds=1, free_gb=0)
    assert kinds(tmp_path / "c", few, steps=30, ago=35) == []
    assert kinds(tmp_path / "d", few, steps=30, ago=45) == ["stalled"]


def test_budget_and_disk(tmp_path: Path) -> None:
    hours = 16 * 2 * 300 / 3600
    for share, expected in ((0.8, []), (0.95, ["budget"]), (1.5, ["budget"])):
        budget = {"gpu_hours": hours / share, "core_hours": None}
        limits = Thresholds(free_gb=0)
        fields = {"steps": 300, "budget": budget}
        run, store = make_run(tmp_path / str(share), **fields)  # type: ignore[arg-type]
        append(run.node_folder("pretrain") / "events.jsonl", {  # all but done, so that nothing more is expected
            "time": time.time(), "event": "progress", "done": 1000, "total": 1000, "unit": "steps"})  # fmt: skip
        with running(store.home):
            current = alerts.alerts(status.take(run, store), store, limits)
        assert [alert.kind for alert in current] == expected, share
    assert kinds(tmp_path / "disk", Thresholds(free_gb=1e6), steps=5) == ["disk"]


def test_spikes_and_dead_experts(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, 200)
    folder = run.node_folder("pretrain")

    def current() -> list[Alert]:
        with running(tmp_path):
            return alerts.alerts(status.take(run, store), store, Thresholds(free_gb=0))

    append(folder / "metrics.jsonl", {"time": 1.0, "step": 270, "spike": 1.0})
    append(folder / "metrics.jsonl", {"time": 1.0, "step": 270, "dead_experts": 2.0})
    assert [(alert.kind, alert.text.partition(": ")[2]) for alert in current()] == [
        ("loss spike", "spikes so far: 1, the last one near step 270")
    ]
    train(folder, time.time(), 400, 2.4)
    assert current() == [], "an update that was skipped long ago is no alert any more"


def test_an_expert_that_stays_dead_is_an_alert_and_one_of_the_first_steps_is_not(tmp_path: Path) -> None:
    """In a short run, and in the first steps of a long one, routers have not settled."""
    run, store = make_run(tmp_path, 5)
    metrics = run.node_folder("pretrain") / "metrics.jsonl"

    def texts(step: int, dead: float) -> list[str]:
        append(metrics, {"time": 1.0, "step": step, "dead_experts": dead})
        with running(tmp_path):
            return [alert.text for alert in alerts.alerts(status.take(run, store), store, Thresholds(free_gb=0))]

    for step in range(0, 1000, 10):
        assert texts(step, 2.0) == []
    assert texts(1000, 2.0) == ["stage pretrain: 2 experts have been dead for 1,000 steps"]
    assert texts(1010, 1.0) == ["stage pretrain: 1 expert has been dead for 1,000 steps"]
    assert texts(1020, 0.0) == [] and texts(1030, 1.0) == []


def test_an_alert_is_sent_once_until_it_is_over(tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    alert, other = Alert("a", "stalled", "x", "text"), Alert("b", "disk", None, "full")

    def watcher(state: Path = tmp_path / "watch.json") -> Watcher:  # a new process each time, as with cron
        return Watcher(RUN, state, f'echo "$ATOM_TEXT" >> {sent}')

    for current in ([alert], [alert], [alert, other], [other], [alert, other]):
        watcher().send(current)
    assert sent.read_text().split() == ["text", "full", "text"]
    assert Watcher(RUN, tmp_path / "nowhere" / "watch.json").send([]) == ([], [])
    with pytest.raises(FileNotFoundError):
        watcher(tmp_path / "nowhere" / "watch.json").send([alert])
    assert len(sent.read_text().split()) == 3, "what cannot be remembered is not sent"
    (tmp_path / "watch.json").write_text("{")
    with pytest.warns(UserWarning, match="all alerts that stand are sent again"):
        watcher().send([other])
    assert sent.read_text().split()[3:] == ["full"]


def test_a_look_without_a_command_takes_no_alert_from_a_later_one(tmp_path: Path) -> None:
    alert, sent = Alert("a", "stalled", "x", "text"), tmp_path / "sent"
    viewer = Watcher(RUN, tmp_path / "watch.json")
    assert [viewer.send([alert])[0] for _ in range(2)] == [[alert], []], "a loop shows it once"
    Watcher(RUN, tmp_path / "watch.json", f"cat > {sent}").send([alert])
    body = {"run": RUN, "id": "a", "kind": "stalled", "stage": "x", "text": "text"}
    assert json.loads(sent.read_text()) == body


def test_what_was_not_taken_is_sent_again(tmp_path: Path) -> None:
    alert, marker = Alert("a", "stalled", "x", "text"), tmp_path / "marker"
    watcher = Watcher(RUN, tmp_path / "watch.json", f"test -e {marker} || {{ echo no >&2; exit 3; }}")
    assert watcher.send([alert]) == ([alert], ["the command of the alert ended with exit code 3: no"])
    assert watcher.send([alert])[1] != []
    marker.touch()
    assert watcher.send([alert]) == ([alert], [])
    assert watcher.send([alert]) == ([], [])


def test_a_command_that_does_not_end_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "SECONDS", 0.2)
    watcher = Watcher(RUN, tmp_path / "watch.json", "exec sleep 60")
    assert watcher.send([Alert("a", "stalled", "x", "text")])[1] == [
        "the command of the alert took more than 0 s; let it end sooner"
    ]


JOB = """
import sys, time
from pathlib import Path
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
home, run = map(Path, sys.argv[1:])
lease, report = Lease.take(home / "work" / "pretrain-0123456789ab"), FileReport(run / "pretrain")
report.event("start", pid=1, ranks=1)
print("running", flush=True)
for step in range(1, 10_000):
    time.sleep(0.1)
    report.event("progress", done=step, total=10_000, unit="steps")
"""


def test_a_job_that_was_killed_is_reported_from_outside(tmp_path: Path) -> None:
    """Nothing inside can report any more: its process is stopped, then killed."""
    run, _ = make_run(tmp_path, 1)
    (run.node_folder("pretrain") / "events.jsonl").unlink()
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path), str(run.folder)], stdout=subprocess.PIPE, text=True
    )
    notes = tmp_path / "notes"
    command = f'echo "$ATOM_RUN $ATOM_ALERT: $ATOM_TEXT" >> {notes}'

    def look(code: int) -> list[str]:
        options = ("--once", "--command", command, "--stalled-seconds", "3", "--free-gb", "0")
        atom(tmp_path, "watch", RUN, *options, code=code)
        return notes.read_text().splitlines() if notes.exists() else []

    try:
        assert job.stdout is not None and job.stdout.readline() == "running\n"
        time.sleep(1.0)
        assert look(0) == []
        os.kill(job.pid, signal.SIGSTOP)
        time.sleep(4.0)
        (stalled,) = look(1)
        assert stalled.startswith(f"{RUN} stalled: stage pretrain has reported nothing for 0:0")
        assert look(1) == [stalled], "once"
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert look(1)[1:] == [
            f"{RUN} failed: stage pretrain failed: its process is gone; run the same command to go on"
        ]
        assert len(look(1)) == 2
    finally:
        job.kill()
        job.wait()
