"""MLflow: filled from files, through SQLite and through a real server, and never in the way of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.core.store import Artifact, Store
from pipeline.tracking import mlflow_sync
from release.hub.local.server import free_port
from tests.fixtures import home_fixtures
from tests.fixtures.run_fixtures import at_length, atom


@contextmanager
def tracking_server(folder: Path, port: int) -> Iterator[str]:
    """The address of a real server, whose data is under `folder`."""
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "files")],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(uri + "/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def runs(uri: str) -> dict[str, object]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("atom-smoke")
    assert experiment
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}


def test_the_store_holds_parent_children_params_inputs_metrics_and_files(smoke_home: Path, smoke_data: Path) -> None:
    """The data stages were sealed before, by a run that was not tracked."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{smoke_home / 'mlflow.db'}"
    runs_by_name = runs(uri)
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
    inputs = {i.dataset.name: i.dataset.digest for i in child.inputs.dataset_inputs}
    tokens = next(name for name in inputs if name.startswith("tokenize-"))
    assert Artifact.open(smoke_home / "artifacts" / tokens).digest.startswith(inputs[tokens])
    assert {"manifest.json", "summary.json", "statement"} <= {f.path for f in client.list_artifacts(child.info.run_id)}


@at_length("training", 50)
def test_a_dead_server_stops_nothing_and_a_real_one_gets_everything_later(tmp_path: Path) -> None:
    home = tmp_path / "home"
    dead = "http://127.0.0.1:9"
    process = atom(home, "run", "atom-smoke", "--until", "items", MLFLOW_TRACKING_URI=dead)
    assert f"MLflow at {dead} did not accept everything" in process.stdout and "all of 1 stage sealed" in process.stdout
    assert "atom: MLflow at" in atom(home, "sync", code=2, MLFLOW_TRACKING_URI=dead).stderr
    with tracking_server(tmp_path, free_port()) as uri:
        atom(home, "sync", MLFLOW_TRACKING_URI=uri)
        run = runs(uri)["items"]
        assert run.info.status == "FINISHED" and run.data.params["problems.add"] == "40"
    assert not (home / "mlflow.db").exists()
    assert "MLFLOW_TRACKING_URI = none, so nothing is sent" in atom(home, "sync", code=2).stderr


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a text", "artifacts"])
def test_what_is_no_database_is_reported_at_once(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "home")
    run = home_fixtures.start(store, home_fixtures.graphs(tmp_path)[0], ["acquire-sums"])
    path = store.home / ("mlartifacts" if kind == "artifacts" else "mlflow.db")
    make = {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: path.write_text("x" * 100))()
    background = mlflow_sync.Background(run, store)
    begun = time.monotonic()
    problem = background.close("FINISHED")
    assert problem and problem.startswith(f"{path} is damaged (it is ") and problem.endswith("; move it away"), problem
    assert time.monotonic() - begun < 10


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
