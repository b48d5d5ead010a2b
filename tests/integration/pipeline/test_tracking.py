"""MLflow: filled from files, through SQLite and through a real server, and never in the way of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Failure, Kind
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.store import Artifact, Store
from pipeline.graph import run as runs_of
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch.rendezvous import free_port
from pipeline.tracking import mlflow_sync
from tests.fixtures import home_fixtures
from tests.fixtures.run_fixtures import at_length, atom
from tests.fixtures.tracking_fixtures import tracked_runs, tracking_server


def test_the_store_holds_parent_children_params_metrics_and_files(smoke_home: Path, smoke_data: Path) -> None:
    """The data stages were sealed before, by a run that was not tracked."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{smoke_home / 'mlflow.db'}"
    runs_by_name = tracked_runs(uri)
    (parent,) = [r for name, r in runs_by_name.items() if name.startswith("atom-smoke-")]
    sealed_before = len(list((smoke_data / "artifacts").iterdir()))
    assert parent.info.status == "FINISHED" and len(runs_by_name) == 1 + 40 - sealed_before, "the run and its stages"
    child = runs_by_name["pretrain"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["phase.optimizer.lr"] == "0.003"
    client = MlflowClient(tracking_uri=uri)
    curve = client.get_metric_history(child.info.run_id, "loss")
    assert [m.step for m in curve] == list(range(1, 61)) and curve[-1].value < curve[0].value
    artifact = Artifact.open(smoke_home / "artifacts" / child.data.tags["atom.key"])
    assert child.data.tags["atom.digest"] == artifact.digest
    assert child.data.params["seed"] == "0"
    speeds = client.get_metric_history(child.info.run_id, "step_seconds")
    assert [m.step for m in speeds] == list(range(1, 61)) and child.data.metrics["peak_memory_bytes"] > 2**20
    scores = runs_by_name["evaluate-rlvr"].data.metrics
    assert scores["bits_per_byte_all"] == parent.data.metrics["evaluate-rlvr/bits_per_byte_all"] > 0
    assert not client.list_artifacts(child.info.run_id)


def started(run: Run, stage: str) -> None:
    """What a worker writes at the start of a stage."""
    report = FileReport(run.node_folder(stage))
    report.event("start", stage=stage, key=stage, pid=os.getpid(), ranks=1)
    report.close()


def ended(run: Run, stage: str, failure: Failure) -> None:
    report = FileReport(run.node_folder(stage))
    report.end(failure)
    report.close()


def test_a_stage_is_shown_from_its_start_and_ended_by_what_happened(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store, graph = Store(tmp_path / "home"), home_fixtures.graphs(tmp_path)[0]
    run = home_fixtures.start(store, graph, graph.select("evaluate-base", None), stop_before="pretrain")
    client = MlflowClient(tracking_uri=f"sqlite:///{store.home / 'mlflow.db'}")

    def child(stage: str = "pretrain") -> Any:
        mlflow_sync.Forwarder(run, store).sync()
        parent_id = mlflow_sync.Forwarder(run, store).state["parent"]
        parent = client.get_run(parent_id)
        children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'")
        return parent, next((each for each in children if each.info.run_name == stage), None)

    lease = Lease.take(store.work(graph.nodes["pretrain"].key))
    assert lease is not None
    started(run, "pretrain")
    report = FileReport(run.node_folder("pretrain"))
    report.metric(1, loss=3.0, step_seconds=0.5, step_tokens_per_s=1000.0)
    report.close()
    parent, row = child()
    assert parent.data.params["pretrain.optimizer.lr"] == "0.003" and row.info.status == "RUNNING"
    assert row.data.tags["atom.commit"] == run.body["commit"] == parent.data.tags["atom.commit"]
    assert row.data.metrics["step_seconds"] == 0.5

    lease.release()
    ended(run, "pretrain", Failure("a rank was killed", Kind.MACHINE))
    row = child()[1]
    assert row.info.status == "FAILED" and row.info.end_time
    assert row.data.tags["atom.error"] == "a rank was killed"

    lease = Lease.take(store.work(graph.nodes["pretrain"].key))
    assert lease is not None
    started(run, "pretrain")
    row = child()[1]
    assert row.info.status == "RUNNING" and not row.data.tags["atom.error"]
    lease.release()
    ended(run, "pretrain", Failure("interrupted", Kind.STOPPED))
    assert child()[1].info.status == "KILLED" and mlflow_sync.outcome_of(runs_of.status(run, store)) == "KILLED"

    home_fixtures.seal(store, run, graph, "pretrain")
    key = graph.nodes["evaluate-base"].key
    out = store.work(key) / "out"
    out.mkdir(parents=True)
    (out / "scores.json").write_text('{"accuracy": {"a,b": {"value": 0.25, "se": 0.1}}, "tokens": 7}')
    started(run, "evaluate-base")
    product = store.seal(out, key, lambda artifact: home_fixtures.state(store, run, graph, "evaluate-base", artifact))
    parent, row = child("evaluate-base")
    assert row.data.metrics["accuracy/a_b"] == 0.25 and row.data.metrics["accuracy/a_b/se"] == 0.1
    assert row.data.metrics["tokens"] == 7 and row.data.tags["atom.digest"] == product.digest
    assert {name: value for name, value in parent.data.metrics.items() if "/" in name} == {
        "evaluate-base/accuracy/a_b": 0.25
    }
    assert child()[1].info.status == "FINISHED" and not child()[1].data.tags["atom.error"]

    mlflow_sync.Forwarder(run, store).sync(over=True)
    assert client.get_run(parent.info.run_id).info.status == "KILLED", "its export is neither sealed nor failed"


@pytest.mark.parametrize(
    ("states", "outcome"),
    [
        (["sealed", "sealed"], "FINISHED"),
        (["sealed", "failed", "waiting"], "FAILED"),
        (["sealed", "lost"], "FAILED"),
        (["sealed", "stopped", "waiting"], "KILLED"),
        (["cancelled", "waiting"], "KILLED"),
        (["sealed", "waiting"], "KILLED"),
    ],
)
def test_a_run_that_is_over_has_the_status_of_its_stages(states: list[str], outcome: str) -> None:
    nodes = [
        NodeStatus("n", "k", "failed" if state == "stopped" else state, kind="stopped" if state == "stopped" else None)
        for state in states
    ]
    assert mlflow_sync.outcome_of(nodes) == outcome


@at_length("training", 50)
def test_a_dead_server_stops_nothing_and_a_real_one_gets_everything_later(tmp_path: Path) -> None:
    home = tmp_path / "home"
    dead = "http://127.0.0.1:9"
    process = atom(home, "run", "atom-smoke", "--until", "items", MLFLOW_TRACKING_URI=dead)
    assert f"MLflow at {dead} did not accept everything" in process.stdout and "all of 1 stage sealed" in process.stdout
    assert "atom: MLflow at" in atom(home, "sync", code=2, MLFLOW_TRACKING_URI=dead).stderr
    with tracking_server(tmp_path, free_port()) as uri:
        atom(home, "sync", MLFLOW_TRACKING_URI=uri)
        run = tracked_runs(uri)["items"]
        assert run.info.status == "FINISHED" and run.data.params["problems.add"] == "40"
    assert not (home / "mlflow.db").exists()
    assert "MLFLOW_TRACKING_URI = none, so nothing is sent" in atom(home, "sync", code=2).stderr


@at_length("training", 20)
def test_the_sentence_about_a_failed_stage_is_a_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "home")
    run = home_fixtures.start(store, home_fixtures.graphs(tmp_path)[0], ["acquire-sums"], stop_before="acquire-sums")
    uri = f"sqlite:///{store.home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    report = FileReport(run.node_folder("acquire-sums"))
    report.event("attempt")
    report.end(Failure("node n7 has 0 GPUs; see http://user:secret@host/x"))
    report.close()
    mlflow_sync.Forwarder(run, store).sync()
    tracked = tracked_runs(uri, "one")["acquire-sums"]
    assert tracked.data.tags["atom.error"] == "node n7 has 0 GPUs; see http://host/x"
    assert tracked.info.status == "FAILED"


def test_one_process_of_a_run_sends_and_the_last_one_ends_the_run(tmp_path: Path) -> None:
    """Also if the run is over although nobody said so: `atom run` was killed."""
    store, graph = Store(tmp_path / "home"), home_fixtures.graphs(tmp_path)[0]
    run = home_fixtures.start(store, graph, ["acquire-sums"])
    uri = f"sqlite:///{store.home / 'mlflow.db'}"

    def follow(*whole: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.tracking.mlflow_sync", str(store.home), run.id, *whole]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    turn = Lease.take(run.folder / "mlflow")
    assert turn is not None
    assert follow("").communicate(timeout=60) == ("", None), "the holder of the turn sends the rest"
    assert not (store.home / "mlflow.db").exists()
    last = follow("whole")
    assert last.stdin is not None
    last.stdin.close()
    time.sleep(1.0)
    assert last.poll() is None, "the end of a run is waited for"
    turn.release()
    assert last.wait(timeout=120) == 0
    parent = tracked_runs(uri, "one")[run.id]
    assert parent.info.status == "FINISHED"  # type: ignore[attr-defined]
    last.stdout.close()  # type: ignore[union-attr]


def test_a_run_sends_nothing_where_tracking_is_off(tmp_path: Path) -> None:
    process = atom(tmp_path, "run", "atom-smoke", "--until", "items", MLFLOW_TRACKING_URI="none")
    assert "all of 1 stage sealed" in process.stdout and "MLflow" not in process.stdout
    assert not list(tmp_path.rglob("mlflow*"))


def test_no_password_of_a_tracking_uri_is_printed(tmp_path: Path) -> None:
    uri = "http://bob:hunter22@127.0.0.1:9"
    process = atom(tmp_path, "run", "atom-smoke", "--until", "items", MLFLOW_TRACKING_URI=uri)
    tracked = atom(tmp_path, "sync", code=2, MLFLOW_TRACKING_URI=uri)
    assert "did not accept everything" in process.stdout and "did not answer" in tracked.stderr
    assert "hunter22" not in process.stdout + process.stderr + tracked.stderr
    assert not any(b"hunter22" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
