"""The state of a stage by its files and by lines as a real Slurm printed them, and the alerts that follow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Kind
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch import bad_nodes, slurm_client, submission_lock
from pipeline.launch.bad_nodes import BadNode
from pipeline.launch.rendezvous import Decision, Verdict
from pipeline.launch.slurm_client import Owner
from pipeline.operations import alerts, run_actions
from pipeline.operations.alerts import Thresholds
from pipeline.tracking import status
from tests.fixtures.slurm_line_fixtures import programs, sacct, script_path, squeue

KEYS = {name: f"{name}-0123456789ab" for name in ("pretrain", "sft")}
RUN = "one-20261130-120000-abcd"


class World:
    """A home with a run on Slurm whose stage `pretrain` has the job 7, and the next stage the job 8."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.folder = Store(folder / "home"), folder
        place = self.store.logs / RUN
        place.mkdir(parents=True)
        nodes = [{"name": name, "stage": name, "key": key, "inputs": {}} for name, key in KEYS.items()]
        body = {
            "id": RUN, "recipe": "one", "version": "1", "recipe_path": "r.yaml", "profile": "dev",
            "launcher": "slurm", "nodes": nodes,
        }  # fmt: skip
        (place / "run.json").write_text(json.dumps(body))
        self.run: Run = runs.find(self.store, None)
        for number, (name, key) in enumerate(KEYS.items(), start=7):
            self.run.note_job(name, str(number), False)
            submission_lock.folder(self.store).mkdir(exist_ok=True)
            submission_lock.write(self.store, key, Owner(RUN, name), str(number))
        monkeypatch.setenv("PATH", programs(folder / "bin", squeue="", sacct="", sinfo="", scontrol="", scancel=""))

    def says(self, **lines: str) -> None:
        """Sets what Slurm's programs print."""
        programs(self.folder / "bin", **lines)

    def attempt(self, launch: str, end: str = "", kind: Kind | None = None, decision: Decision | None = None) -> None:
        """An attempt of pretrain, with its end and the decision of its launch."""
        folder = self.run.node_folder("pretrain")
        (folder / "ranks" / launch).mkdir(parents=True, exist_ok=True)
        report = FileReport(folder)
        report.event("attempt", job="7", launch=launch, host="n1", pid=1)
        if end:
            report.event("end", outcome=end, kind=kind)
        report.close()
        if decision is not None:
            Verdict(decision, end, kind).write(folder / "ranks" / launch)

    def look(self, **limits: Any) -> tuple[NodeStatus, list[alerts.Alert]]:
        """The status of pretrain, and the alerts of the run."""
        taken = status.take(runs.find(self.store, None), self.store)
        current = alerts.alerts(taken, self.store, Thresholds(free_gb=0, **limits))
        return taken.stages[0].status, current


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


STOPPED = "stopped on request (SIGUSR2, 4:59 before its time limit of 24:00:00); run the same command to go on"


def test_a_requeue_is_no_failure_at_any_of_its_moments(world: World) -> None:
    running = squeue("7", "RUNNING", RUN, "pretrain", nodes="n[1-2]")
    later = squeue("8", "PENDING", RUN, "sft", "Dependency")
    world.says(squeue=f"{running}\n{later}")
    world.attempt("7.0", STOPPED, Kind.STOPPED)
    stage, current = world.look()
    assert (stage.state, stage.message, current) == ("restarting", STOPPED, []), "rank 0 is about to decide"
    world.attempt("7.0", STOPPED, Kind.STOPPED, Decision.RESTART)
    stage, current = world.look()
    assert (stage.state, current) == ("restarting", []), "the script is about to requeue the job"
    world.says(squeue=squeue("7", "PENDING", RUN, "pretrain", "BeginTime") + f"\n{later}")
    stage, current = world.look()
    assert (stage.state, current) == ("pending", []) and "as after each requeue (BeginTime)" in str(stage.reason)
    (world.run.node_folder("pretrain") / "ranks/7.1").mkdir()
    world.says(squeue=f"{running}\n{later}")
    stage, current = world.look()
    assert (stage.state, stage.message, current) == ("running", "", []), "the next start has not logged anything yet"
    assert stage.restarts == 1


def test_a_failure_is_one_alert_from_the_decision_on(world: World) -> None:
    sent = world.folder / "sent"
    watcher = alerts.Watcher(RUN, world.folder / "watch.json", f'echo "$ATOM_TEXT" >> {sent}')
    dependent = squeue("8", "PENDING", RUN, "sft", "Dependency")
    world.says(squeue=squeue("7", "RUNNING", RUN, "pretrain", nodes="n1") + f"\n{dependent}")
    world.attempt("7.0", "recipe r: no", Kind.USER, Decision.FAILED)
    stage, current = world.look()
    assert stage.state == "ending"
    watcher.send(current)
    failed = squeue("7", "FAILED", RUN, "pretrain", "NonZeroExitCode", nodes="n1")
    cascade = squeue("8", "CANCELLED", RUN, "sft", "DependencyNeverSatisfied")
    world.says(squeue=f"{failed}\n{cascade}", sacct=sacct("7", "FAILED", RUN, "pretrain", "2:0") + "\n"
               + sacct("8", "CANCELLED", RUN, "sft", nodes="None assigned"))  # fmt: skip
    stage, current = world.look()
    assert stage.state == "failed" and [alert.kind for alert in current] == ["failed"]
    watcher.send(current)
    assert sent.read_text() == "stage pretrain ending: recipe r: no\n"


CANCELLED = {
    "root": ("CANCELLED by 0", "root cancelled its job; `atom retry` submits it again", True),
    "its user": ("CANCELLED by 65534", "nobody cancelled its job; `atom retry` submits it again", False),
    "not known": ("CANCELLED", "somebody cancelled its job; `atom retry` submits it again", False),
}


@pytest.mark.parametrize("name", CANCELLED)
def test_a_cancelled_job_names_who_did_it_and_others_are_an_alert(name: str, world: World) -> None:
    state, sentence, alert = CANCELLED[name]
    world.says(
        squeue=squeue("7", "CANCELLED", RUN, "pretrain", user="nobody"),
        sacct=sacct("7", state, RUN, "pretrain", user="nobody"),
    )
    stage, current = world.look()
    assert (stage.state, stage.message) == ("cancelled", sentence)
    assert [each.kind for each in current if each.stage == "pretrain"] == (["cancelled"] if alert else [])


ENDED = {
    "its partition is gone": (("NODE_FAIL", "1:0"), f"{STOPPED} (Slurm ended its job: node_fail exit code 1)"),
    "its time limit": (("TIMEOUT", "0:0"), f"{STOPPED} (Slurm ended its job: timeout exit code 0)"),
    "its script failed": (("FAILED", "2:0"), f"{STOPPED} (Slurm ended its job: failed exit code 2)"),
}


@pytest.mark.parametrize("name", ENDED)
def test_a_stage_that_was_stopped_and_did_not_go_on_names_what_became_of_its_job(name: str, world: World) -> None:
    (state, code), sentence = ENDED[name]
    world.attempt("7.0", STOPPED, Kind.STOPPED, Decision.RESTART)
    world.says(squeue=squeue("7", state, RUN, "pretrain", nodes="n1"), sacct=sacct("7", state, RUN, "pretrain", code))
    stage, _ = world.look()
    assert stage.state == "failed" and stage.message.startswith(sentence), stage


def test_a_dependent_that_slurm_cancelled_says_so(world: World) -> None:
    queued = squeue("7", "CANCELLED", RUN, "pretrain", "DependencyNeverSatisfied")
    world.says(squeue=queued, sacct=sacct("7", "CANCELLED", RUN, "pretrain", nodes="None assigned"))
    stage, _ = world.look()
    assert stage.message.startswith("Slurm cancelled its job, because a job that it waited for did not succeed")


@pytest.mark.parametrize("comment", ["charged to project 42", "a|b", f"atom other-1 sft {KEYS['sft']}"])
def test_a_sites_comment_changes_nothing(comment: str, world: World) -> None:
    world.says(squeue=squeue("7", "PENDING", RUN, "pretrain", "Priority", comment=comment))
    stage, _ = world.look()
    assert (stage.state, stage.reason) == ("pending", "jobs of higher priority come first (Priority)")
    jobs = slurm_client.queued_jobs(["root"])
    claim = submission_lock.read(world.store, KEYS["pretrain"])
    assert claim is not None and claim.holds(jobs), "it is not submitted a second time"
    assert run_actions.cancel_jobs(world.run, world.store) == ["pretrain"]
    assert (world.folder / "bin/calls").read_text().splitlines()[-1] == "scancel 7"


def test_a_script_that_the_site_copied_is_known_by_the_comment(world: World) -> None:
    comment = Owner(RUN, "pretrain").comment(KEYS["pretrain"])
    world.says(squeue=squeue("7", "PENDING", RUN, "pretrain", "Priority", comment=comment, command="/tmp/copy.sh"))
    assert world.look()[0].state == "pending"


OTHERS = {
    "another run": script_path("other-1", "pretrain"),
    "another stage": script_path(RUN, "sft"),
    "the servers of the stage": script_path(RUN, "pretrain", "servers"),
    "another program": "/home/ann/train.sh",
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_id_that_slurm_gave_to_another_job_is_left_alone(name: str, world: World) -> None:
    """By a controller that lost its state. Accounting has the later job with that id, too."""
    line = squeue("7", "RUNNING", RUN, "pretrain", command=OTHERS[name])
    ended = f"7|COMPLETED|0:0|n1|00:00:01|root|None|sbatch {OTHERS[name]}|" if "program" not in name else ""
    world.says(squeue=line, sacct=ended)
    stage, current = world.look()
    assert stage.state == "lost" and [each.kind for each in current if each.stage == "pretrain"] == ["failed"]
    assert stage.message == (
        "Slurm no longer has its job (a later job may have the id 7); `atom retry` submits it again"
    )
    jobs = slurm_client.queued_jobs(["root"])
    claim = submission_lock.read(world.store, KEYS["pretrain"])
    assert claim is not None and not claim.holds(jobs)
    assert run_actions.cancel_jobs(world.run, world.store) == []


def test_alerts_on_a_slow_rank_and_an_avoided_node(world: World) -> None:
    now = time.time()
    report = FileReport(world.run.node_folder("pretrain"))
    report._events.write(json.dumps({"time": now - 100, "event": "attempt", "launch": "7.0"}) + "\n")
    slow = {"event": "slow_rank", "text": "rank 1 on n2 computes 2.8 times as long as its peers since step 41"}
    report._events.write(json.dumps({"time": now - 50, **slow}) + "\n")
    report.close()
    for node, run in (("n2", RUN), ("n3", "other-1")):
        bad_nodes.record(world.store, BadNode(int(now) + 3600, node, "its fan is bad", run, "pretrain", "7"))
    waiting = squeue("8", "PENDING", RUN, "sft", "Priority")
    world.says(squeue=squeue("7", "RUNNING", RUN, "pretrain", nodes="n1") + f"\n{waiting}")
    lease = Lease.take(world.store.work(KEYS["pretrain"]))
    assert lease is not None
    try:
        _, current = world.look(stalled_seconds=40)
        assert {alert.kind for alert in world.look()[1]} == {"avoided node"}, "a rank is slow for a moment now and then"
    finally:
        lease.release()
    texts = {alert.kind: alert.text for alert in current}
    assert texts["slow rank"].endswith("rank 1 on n2 computes 2.8 times as long as its peers since step 41")
    assert texts["avoided node"].startswith("node n2 is avoided for another ") and "n3" not in str(texts)


def test_the_time_of_a_stage_is_that_of_all_attempts_and_a_report_has_an_age(world: World) -> None:
    now = time.time()
    rows: list[dict[str, Any]] = [
        {"time": now - 1000, "event": "attempt", "launch": "7.0"},
        {"time": now - 999, "event": "start", "pid": 1, "ranks": 2},
        {"time": now - 900, "event": "progress", "done": 5, "total": 9, "unit": "steps"},  # and then it was killed
        {"time": now - 500, "event": "attempt", "launch": "7.1"},
        {"time": now - 450, "event": "end", "outcome": "it is gone", "kind": "machine"},
        {"time": now - 40, "event": "attempt", "launch": "7.2"},
        {"time": now - 30, "event": "start", "pid": 1, "ranks": 2},
        {"time": now - 10, "event": "end", "outcome": "sealed"},
    ]
    folder = world.run.node_folder("pretrain")
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stage, _) = runs.status(world.run, world.store)
    assert stage.seconds == pytest.approx(100 + 50 + 30) and stage.last_report == pytest.approx(now - 10)
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    (stage, _) = runs.status(world.run, world.store)
    assert stage.seconds == pytest.approx(100 + 50 + 10), "up to its last sign of life"
    running = NodeStatus("pretrain", "k", "running", seconds=5.0, eta=17.0, last_report=time.time() - 78)
    assert running.times == ("0:05", "0:17", "1:18 ago")


def test_starts_on_one_machine_are_timed_as_well(world: World) -> None:
    """Without a job, no event announces an attempt."""
    folder = world.run.node_folder("pretrain")
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"time": 100.0, "event": "start", "pid": 1, "ranks": 1},
        {"time": 130.0, "event": "note", "text": "killed after this"},
        {"time": 200.0, "event": "start", "pid": 1, "ranks": 1},
        {"time": 260.0, "event": "end", "outcome": "sealed"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.status(world.run, world.store)[0].seconds == 90.0


def test_queued_jobs_are_read_as_slurm_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "21|PENDING||0:00|ReqNodeNotAvail, Reserved for maintenance|nobody|test|"
        f"{script_path(RUN, 'pretrain')}|(null)|",
        "22|PENDING||0:00|Reservation|nobody|test|/home/ann/sub.sh|(null)|",
        "a comment may have lines|",
        "",
    ]
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", squeue="\n".join(lines)))
    (job,) = slurm_client.queued_jobs(["nobody"]).values()
    assert (job.id, job.state, job.user, job.partition) == ("21", "PENDING", "nobody", "test")
    assert job.owner == Owner(RUN, "pretrain") and job.reason == "ReqNodeNotAvail, Reserved for maintenance"
