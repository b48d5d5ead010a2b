"""`atom runs` and `atom compare`: from files of runs that real recipes began, in milliseconds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.core.errors import Failure, Kind
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.store import Store
from pipeline.graph import flat_fields
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.graph.run import Run
from pipeline.operations import comparison, run_actions
from tests.fixtures import home_fixtures

PRICES = {"gpu_hour": 3.0, "core_hour": 0.5, "currency": "EUR"}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> list[Graph]:
    return home_fixtures.graphs(tmp_path_factory.mktemp("recipes"))


def log(run: Run, stage: str, **curves: list[float]) -> None:
    """A log of metrics, as a stage writes it."""
    report = FileReport(run.node_folder(stage))
    for name, values in curves.items():
        for step, value in enumerate(values, 1):
            report.metric(step, **{name: value})
    report.close()


def test_two_runs_are_compared_by_settings_metrics_scores_and_cost(tmp_path: Path, graphs: list[Graph]) -> None:
    store = Store(tmp_path / "home")
    first = home_fixtures.start(store, graphs[0], graphs[0].select("evaluate-base", None))
    second = home_fixtures.start(store, graphs[1], graphs[1].select("evaluate-base", None), stop_before="pretrain")
    log(first, "pretrain", loss=[3.0, 2.0, 1.0], lr=[0.1, 0.2, 0.3])
    log(second, "pretrain", loss=[3.0, 2.5])
    log(second, "pretrain", loss=[3.0, 2.25])  # a restart trained both steps again
    rows = [comparison.measure(run, store) for run in (first, second)]
    assert comparison.differing_settings(rows) == {"pretrain.steps": [60, 90]}
    assert [row.metrics["pretrain"]["loss"] for row in rows] == [1.0, 2.25]
    assert rows[0].cost.attempts == len(first.body["nodes"])
    assert rows[0].cost.core_hours == pytest.approx(len(first.body["nodes"]))  # an hour of each, by the fixture
    assert rows[1].cost.attempts > 1, "the other run had sealed its data"
    assert rows[0].cost.money is None


def test_a_stage_that_another_run_sealed_has_its_metrics_there(tmp_path: Path, graphs: list[Graph]) -> None:
    store = Store(tmp_path / "home")
    first = home_fixtures.start(store, graphs[0], graphs[0].select("pretrain", None))
    log(first, "pretrain", loss=[3.0, 2.0])
    later = runs.start(
        graphs[0], store, graphs[0].select("pretrain", None), "local", {"launcher": "local", "prices": PRICES}
    )
    row = comparison.measure(later, store)
    assert row.metrics == {"pretrain": {"loss": 2.0}}
    assert row.cost.money == pytest.approx(0.5 * len(first.body["nodes"])) and row.cost.currency == "EUR"
    assert row.sealed == len(first.body["nodes"])
    assert row.json()["commit"], "the run began from a checkout"


def test_scores_are_the_numbers_of_what_a_stage_measured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    out = store.work("evaluate-x-1") / "out"
    out.mkdir(parents=True)
    scores = {"accuracy": {"add,strict": {"value": 0.5, "se": 0.1, "n": 4}}, "all": {"value": 1, "n": 2}, "engine": "x",
              "examples": [{"reward": 1.0}], "flag": True, "none": None, "tokens": 3}  # fmt: skip
    (out / "scores.json").write_text(json.dumps(scores))
    artifact = store.seal(out, "evaluate-x-1", lambda product: None)
    numbers = flat_fields.scores_of(artifact)
    assert numbers == {
        "accuracy/add,strict": 0.5, "accuracy/add,strict/se": 0.1, "accuracy/add,strict/n": 4.0,
        "all": 1.0, "all/n": 2.0, "tokens": 3.0,
    }  # fmt: skip
    assert flat_fields.estimates(numbers) == {"accuracy/add,strict": 0.5, "all": 1.0}


def test_each_run_has_its_state(tmp_path: Path, graphs: list[Graph]) -> None:
    store = Store(tmp_path / "home")
    graph, other = graphs[0], graphs[2]
    home_fixtures.start(store, graph, ["acquire-sums"])
    gone = home_fixtures.start(store, other, ["acquire-sums", "pretrain"], stop_before="pretrain")
    ended = {}
    for kind in (Kind.MACHINE, Kind.STOPPED):
        ended[kind] = runs.start(graph, store, ["acquire-sums", "acquire-code"], "local", {"launcher": "local"})
        report = FileReport(ended[kind].node_folder("acquire-code"))
        report.event("start", stage="acquire", key=graph.nodes["acquire-code"].key, pid=1, ranks=1)
        report.end(Failure(f"it was {kind}", kind))
        report.close()
    live = runs.start(graph, store, ["acquire-code"], "local", {"launcher": "local"})
    FileReport(live.node_folder("acquire-code")).event("start", stage="acquire", key="k", pid=1, ranks=1)
    begun = runs.start(graph, store, ["acquire-worked"], "local", {"launcher": "local"})
    lease = Lease.take(store.work(graph.nodes["acquire-code"].key))
    try:
        assert lease is not None
        os.utime(live.node_folder("acquire-code") / "events.jsonl")
        rows, lack = run_actions.list_rows(runs.runs(store), store)
    finally:
        if lease is not None:
            lease.release()
    states = {row.id: row.state for row in rows}
    assert lack is None and states[live.id] == "running" and states[gone.id] == states[begun.id] == "unfinished"
    assert states[runs.runs(store)[0].id] == "sealed"
    rows = run_actions.list_rows(runs.runs(store), store)[0]  # nobody holds the lease any more
    by_id = {row.id: row for row in rows}
    failed, stopped = by_id[ended[Kind.MACHINE].id], by_id[ended[Kind.STOPPED].id]
    assert (failed.state, failed.message, failed.stage, failed.sealed) == (
        "failed",
        "it was machine",
        "acquire-code",
        1,
    )
    assert stopped.state == "stopped" and by_id[live.id].state == "unfinished"
    assert abs(failed.last_event - time.time()) < 60 and failed.json()["recipe"] == graph.recipe.config.name


def test_the_commands_print_tables_and_json(
    tmp_path: Path, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home")
    assert "there is no run under" in CliRunner().invoke(app, ["runs"]).stdout
    ids = []
    for graph in graphs:
        run = home_fixtures.start(store, graph, graph.select("pretrain", None))
        log(run, "pretrain", loss=[3.0, 2.0])
        ids.append(run.id)
    listed = CliRunner().invoke(app, ["runs", "--last", "2"]).stdout
    assert ids[0] not in listed and ids[1] in listed and "and 1 earlier runs: atom runs --last 0" in listed
    body = json.loads(CliRunner().invoke(app, ["runs", "--json", "--recipe", "one"]).stdout)
    assert [row["id"] for row in body["runs"]] == ids[:2] and body["earlier"] == 0
    compared = CliRunner().invoke(app, ["compare", *ids])
    assert compared.exit_code == 0 and "pretrain.steps" in compared.stdout
    rows = json.loads(CliRunner().invoke(app, ["compare", *ids, "--json"]).stdout)
    assert rows["different"]["pretrain.steps"] == [60, 90, 120] and len(rows["runs"]) == 3
