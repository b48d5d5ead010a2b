"""The look at each node before a stage begins, and when there is no sense in another attempt."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import Failure, Kind
from pipeline.core.store import Store
from pipeline.launch import job, preflight
from pipeline.launch.attempt import Task
from pipeline.launch.rendezvous import FAILURES, Decision, Ranks, Verdict, write
from tests.fixtures.preflight_fixtures import ranks


def check(home: Path, free_gb: float = 0.0, scratch: str | None = None) -> str | None:
    failure = preflight.check(home, ranks(home), free_gb, scratch)
    assert failure is None or failure.kind is Kind.MACHINE
    return failure and failure.text


def test_a_sound_node_has_nothing_wrong(tmp_path: Path) -> None:
    assert check(tmp_path, 0.0, str(tmp_path)) is None
    assert not list(tmp_path.glob(".probe*"))


def test_what_is_wrong_with_a_node_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    message = check(tmp_path, 1e9)
    assert message and message.startswith("node n7 has ") and "less than free_gb = 1e+09" in message
    message = check(tmp_path, 0.0, str(tmp_path / "none"))
    assert message and message.startswith("node n7 cannot write to ") and "No such file" in message
    message = check(tmp_path, 0.0, "/sys")  # nobody can write there, not even root
    assert message and message.startswith("node n7 cannot write to /sys (")
    real = time.time
    for offset, words in ((300.0, "300 s ahead of"), (-300.0, "300 s behind")):
        monkeypatch.setattr(preflight.time, "time", lambda offset=offset: real() + offset)
        message = check(tmp_path)
        assert message == f"the clock of node n7 is {words} the file system's; set it by NTP"
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert "0 GPUs under /dev, and Slurm gave 2; check the NVIDIA driver" in (check(tmp_path) or "")


@pytest.mark.parametrize(
    ("soft", "hard", "ranks", "after"),
    [(1024, 3000, 8, 3000), (1024, 10**6, 512, 65536), (1024, -1, 512, 65536), (10**5, 10**6, 512, 10**5)],
)
def test_a_job_may_open_as_many_files_as_the_hard_limit_allows(
    soft: int, hard: int, ranks: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever soft limit the login node has handed on."""
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    assert preflight.check_node(tmp_path, 0.0, None, ranks) is None
    assert limits[-1] == (after, hard)


def test_a_hard_limit_of_open_files_that_is_too_low_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 2000))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: None)
    assert preflight.check_node(tmp_path, 0.0, None, 8) is None
    failure = preflight.check_node(tmp_path, 0.0, None, 512)
    assert (
        failure is not None
        and failure.bad_node == "n7"
        and failure.text
        == (
            "node n7 lets a process have 2000 files open, and one of 512 ranks needs 2560; have its hard limit raised "
            "(ulimit -Hn, LimitNOFILE of slurmd)"
        )
    )


def verdict_of_rank_0(folder: Path, size: int, **free: float) -> str | None:
    """The verdict of rank 0, with the others in threads. What fails is announced, as the job does it."""

    def follow(rank: int) -> None:
        failure = preflight.check(folder, ranks(folder, size, rank), free.get(f"r{rank}", 0.0), None)
        if failure is not None:
            ranks(folder, size, rank).announce(failure)

    others = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for other in others:
        other.start()
    failure = preflight.check(folder, ranks(folder, size), free.get("r0", 0.0), None)
    if failure is not None:
        ranks(folder, size).announce(failure)
    for other in others:
        other.join(20)
        assert not other.is_alive(), "a rank waits on"
    return failure and failure.text


def test_ranks_leave_one_file_each(tmp_path: Path) -> None:
    assert verdict_of_rank_0(tmp_path, 3) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checked-1.json", "checked-2.json", FAILURES]


def test_a_rank_whose_node_is_full_is_reported_by_rank_0(tmp_path: Path) -> None:
    assert "GB free in" in (verdict_of_rank_0(tmp_path, 3, r2=1e9) or "")


def test_rank_0s_own_node_ends_the_others_at_once(tmp_path: Path) -> None:
    assert "GB free in" in (verdict_of_rank_0(tmp_path, 3, r0=1e9) or "")


def test_a_rank_that_fails_before_it_calls_ends_the_wait_of_rank_0(tmp_path: Path) -> None:
    ranks(tmp_path, 3, 2).announce(Failure("its driver is gone"))
    failure = preflight.check(tmp_path, ranks(tmp_path, 3), 0.0, None)
    assert failure and failure.text == "rank 2: its driver is gone"


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.5)
    failure = preflight.check(tmp_path, ranks(tmp_path, 3), 0.0, None)
    assert failure and failure.text == "rank 1 and 1 more of 3 did not start within 0 s; see its log"


def test_other_packages_on_another_node_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "checked-1.json", {"node": "n9", "wrong": None, "lock": "another"})
    failure = preflight.check(tmp_path, ranks(tmp_path, 2), 0.0, None)
    assert failure and failure.text.startswith("nodes n9 and ")
    assert "differ in Python, packages or processor" in failure.text


def test_attempts_are_counted_until_one_gets_further(tmp_path: Path) -> None:
    def standstill_after(*rows: dict) -> tuple[int, str]:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **row}) + "\n" for row in rows))
        state = job.standstill(tmp_path)
        return state.since, state.where

    start, progress = {"event": "attempt"}, lambda n: {"event": "progress", "done": n, "total": 9, "unit": "steps"}
    assert standstill_after() == (
        0,
        "-1 attempts ended at the start without getting further; of the last one: it was killed",
    )
    assert standstill_after(start)[0] == 1 and standstill_after(start, progress(1))[0] == 0
    assert standstill_after(start, progress(5), start, progress(3), start, progress(5))[0] == 2
    count, place = standstill_after(start, progress(5), start, {"event": "end", "outcome": "a bug"}, start)
    assert count == 2 and place == "1 attempts ended at 5/9 steps without getting further; of the last one: a bug"
    assert standstill_after(start, progress(5), start, start, progress(6))[0] == 0
    launch = tmp_path / "ranks/7.0"
    launch.mkdir(parents=True)
    Verdict(Decision.RESTART, "memory of n1 ran out", Kind.MACHINE).write(launch)
    rows = ({**start, "launch": "7.0"}, {**start, "launch": "7.1"})
    assert standstill_after(*rows)[1].endswith("of the last one: memory of n1 ran out"), "by the job's script"
    rows = (start, {"event": "end", "outcome": "a bug"}, *rows[1:], {**start, "launch": "7.2"})
    assert standstill_after(*rows)[1].endswith("of the last one: it was killed"), "not of one before"
    end = {"event": "end", "outcome": "KeyError", "kind": "bug"}
    for rows, repeated in (
        ((start, end), False),
        ((start, end, start, end), True),
        ((start, end, start, progress(5), end), False),
        ((start, end, start, {**end, "outcome": "OSError"}), False),
        ((start, {"event": "end", "outcome": "KeyError"}) * 2, False),  # of before kinds existed
        ((start, {**end, "kind": "machine"}) * 2, False),
    ):
        standstill_after(*rows)
        assert job.standstill(tmp_path).repeated == repeated, rows


def be_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "1", "LOCAL_GLOBALID": "0"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.setattr(job.clean_environment, "require", lambda names: None)


def test_a_job_whose_run_has_lost_its_file_is_not_started_again_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_job(monkeypatch)
    task = Task(str(tmp_path), "run", "n", "n", {}, {}, "n-0", 8.0, 1)
    assert job.run(task, job.JobLimits(None, 0, 0.0, None)) == Decision.FAILED
    decided = (tmp_path / "logs/run/n/ranks/7.0/decision").read_text()
    assert decided.startswith("failed\nmachine\nrun.json of run cannot be read ("), decided


@pytest.mark.parametrize(("outcome", "quick"), [("sealed", False), (Failure("the disk failed"), True)], ids=str)
def test_a_failed_job_of_one_rank_waits_for_mlflow_a_moment_only(
    outcome: str | Failure, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Companion:
        def __init__(self, home: Path, run: str, whole: bool) -> None: ...

        def close(self, over: bool, quick: bool) -> None:
            closed.append(quick)

    def attempt(task: Task, store: Store, ranks: Ranks, ended: Callable[[str | Failure], None]) -> str | Failure:
        ended(outcome)
        return outcome

    be_a_job(monkeypatch)
    monkeypatch.setattr(job, "Companion", Companion)
    monkeypatch.setattr(job, "attempt", attempt)
    task = Task(str(tmp_path), "run", "n", "n", {}, {}, "n-0", 8.0, 1)
    body = {
        "id": "run",
        "recipe": "r",
        "version": "1.0.0",
        "recipe_path": "/r.yaml",
        "profile": "local",
        "launcher": "slurm",
    }
    (tmp_path / "logs/run").mkdir(parents=True)
    (tmp_path / "logs/run/run.json").write_text(
        json.dumps({**body, "nodes": [{"name": "n", "stage": "n", "key": "n-0"}]})
    )
    decision = job.run(task, job.JobLimits(None, 0, 0.0, None))
    assert decision == (Decision.FAILED if quick else Decision.SEALED) and closed == [quick]


def test_signals_to_stop_are_seen_whoever_handles_them() -> None:
    import signal

    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with job.watch_stop_signals() as stop_requested:
            assert not stop_requested()
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop_requested() and stop_requested()
        with job.watch_stop_signals() as stop_requested:
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGUSR2, before)
