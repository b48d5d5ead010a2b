"""The look at each node before a stage begins, and when there is no sense in another attempt."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from pipeline.launch import job, preflight
from pipeline.launch.ranks import read, write
from pipeline.launch.worker import Task


def task(home: Path, ranks: int = 1) -> Task:
    return Task(str(home), "run", "node", "items", {}, {}, "node-0", 8.0, ranks)


def test_a_sound_node_has_nothing_wrong(tmp_path: Path) -> None:
    assert preflight.check(task(tmp_path), tmp_path, 0, 0.0, str(tmp_path)) is None
    assert not list(tmp_path.glob(".probe*"))


def test_what_is_wrong_with_a_node_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    said = preflight.check(task(tmp_path), tmp_path, 0, 1e9, None)
    assert said and said.startswith("node n7 has ") and "less than free_gb = 1e+09" in said
    said = preflight.check(task(tmp_path), tmp_path, 0, 0.0, str(tmp_path / "none"))
    assert said and said.startswith("node n7 cannot write to ") and "No such file" in said
    said = preflight.check(task(tmp_path), tmp_path, 0, 0.0, "/sys")  # nobody can write there, not even root
    assert said and said.startswith("node n7 cannot write to /sys (")
    monkeypatch.setattr(preflight.time, "time", lambda: 0.0)
    said = preflight.check(task(tmp_path), tmp_path, 0, 0.0, None)
    assert said and said.startswith("the clock of node n7 differs by ")
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert "0 GPUs under /dev, and Slurm gave 2" in (preflight.check(task(tmp_path), tmp_path, 0, 0.0, None) or "")


def look(folder: Path, ranks: int, **free: float) -> str | None:
    """The verdict of rank 0, with the others in threads."""
    others = [
        threading.Thread(
            target=preflight.check, args=(task(folder, ranks), folder, rank, free.get(f"r{rank}", 0.0), None)
        )
        for rank in range(1, ranks)
    ]
    for other in others:
        other.start()
    said = preflight.check(task(folder, ranks), folder, 0, free.get("r0", 0.0), None)
    for other in others:
        other.join(10)
    return said


def test_ranks_call_rank_0(tmp_path: Path) -> None:
    assert look(tmp_path, 4) is None
    assert sorted(path.name for path in tmp_path.glob("node-*")) == ["node-1.json", "node-2.json", "node-3.json"]


def test_a_rank_whose_node_is_full_is_told_by_rank_0(tmp_path: Path) -> None:
    assert "GB free in" in (look(tmp_path, 3, r2=1e9) or "")


def test_rank_0s_own_node_ends_the_others_at_once(tmp_path: Path) -> None:
    assert "GB free in" in (look(tmp_path, 2, r0=1e9) or "")
    assert (read(tmp_path / "node-1.json") or {})["wrong"]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.5)
    said = preflight.check(task(tmp_path, 3), tmp_path, 0, 0.0, None)
    assert said == "rank 1 and 1 more of 3 did not start within 0 s; its own log may tell why"


def test_other_packages_on_another_node_are_told(tmp_path: Path) -> None:
    write(tmp_path / "node-1.json", {"wrong": None, "node": "n9", "lock": "another"})
    said = preflight.check(task(tmp_path, 2), tmp_path, 0, 0.0, None)
    assert said and said.startswith("nodes n9 and ") and "differ in Python, packages or processor" in said


def test_attempts_are_counted_until_one_gets_further(tmp_path: Path) -> None:
    def happened(*rows: dict) -> tuple[int, str]:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return job.standstill(tmp_path)

    start, done = {"event": "attempt"}, lambda n: {"event": "progress", "done": n, "total": 9, "unit": "steps"}
    assert happened() == (0, "-1 attempts ended at the start without getting further; of the last one: it was killed")
    assert happened(start)[0] == 1 and happened(start, done(1))[0] == 0
    assert happened(start, done(5), start, done(3), start, done(5))[0] == 2
    count, said = happened(start, done(5), start, {"event": "end", "outcome": "a bug"}, start)
    assert count == 2 and said == "1 attempts ended at 5/9 steps without getting further; of the last one: a bug"
    assert happened(start, done(5), start, start, done(6))[0] == 0


def test_signals_to_stop_are_seen_whoever_handles_them() -> None:
    import signal

    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with job.told_to_stop() as told:
            assert not told()
            os.kill(os.getpid(), signal.SIGUSR2)
            assert told() and told()
        with job.told_to_stop() as told:
            assert not told()
    finally:
        signal.signal(signal.SIGUSR2, before)
