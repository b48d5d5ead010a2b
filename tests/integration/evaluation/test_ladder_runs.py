"""`atom ladder` on runs in `$ATOM_HOME`: what it reads of sealed stages, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Store, write_manifest
from pipeline.graph import dag
from release.prediction import ladder
from stages.evaluation.ladder_laws import FORMS, PRETRAINING
from tests.fixtures.prediction_fixtures import SIZES, graph, recipe, seal_run

pytestmark = pytest.mark.numeric


def loss(size: float, tokens: float) -> float:
    return 1.5 + 40 * size**-0.3 + 30 * tokens**-0.25


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Store, list[dag.Graph]]:
    """Three sizes with three numbers of tokens each, sealed with the losses of a known law."""
    store, graphs = Store(tmp_path / "home"), []
    for name in SIZES:
        for steps in (60, 120, 240):
            run = graph(recipe(tmp_path, name, pretrain={"steps": steps}), store.home)
            size = ladder.size_of(run)
            seal_run(store, run, loss(size["parameters"], size["tokens"]))
            graphs.append(run)
    return store, graphs


def test_sealed_runs_predict_the_next_size(runs: tuple[Store, list[dag.Graph]]) -> None:
    store, graphs = runs
    points = ladder.read_runs(graphs, store, PRETRAINING)
    assert len({point.figures["parameters"] for point in points}) == len({p.figures["tokens"] for p in points}) == 3
    size = ladder.size_of(graph("atom-smoke", store.home))
    (row,) = ladder.make(PRETRAINING, points, [("atom-smoke", size)]).expectations
    assert row.band.value == pytest.approx(loss(size["parameters"], size["tokens"]), rel=1e-3)


def test_other_data_and_missing_runs_are_refused(runs: tuple[Store, list[dag.Graph]], tmp_path: Path) -> None:
    store, graphs = runs
    other = graph(recipe(tmp_path, "s3", tokenizer={"vocab_size": 380}), store.home)
    for added, words in (
        (other, "s3 has other data than s1: its tokenize has another key"),
        (graph("atom-smoke", store.home), "pretrain of atom-smoke is not sealed; run it first: atom run"),
    ):
        with pytest.raises(AtomError, match=words):
            ladder.read_runs([*graphs, added], store, PRETRAINING)


def seal(store: Store, of: dag.Graph, node: str, name: str, text: str) -> None:
    folder = store.artifacts / of.nodes[node].key
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    write_manifest(folder, folder.name)


def test_reinforcement_and_answers_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    run = graph("atom-smoke", store.home)
    last = [node for node in run.nodes if node.startswith("solve-")][-1]
    with pytest.raises(AtomError, match="rlvr of atom-smoke is not sealed"):
        ladder.read_runs([run], store, FORMS["reinforcement"])
    log: list[dict[str, Any]] = [
        {"step": n, "generated": 1000 * n, "validation": {"add": 0.1 * n, "sort": 0.3}} for n in range(4)
    ]
    seal(store, run, "rlvr", "training.jsonl", "".join(json.dumps(row) + "\n" for row in (*log, {"step": 9})))
    points = ladder.read_runs([run], store, FORMS["reinforcement"])
    assert [point.figures["compute"] for point in points] == [0.0, 1000.0, 2000.0, 3000.0]
    assert points[-1].figures["score"] == pytest.approx(0.3)
    at = {str(k): {"tokens": 20.0 * k, "pass": {"value": 0.1 * k, "se": 0.1, "n": 9}} for k in (1, 2, 4)}
    seal(store, run, last, "scores.json", json.dumps({"problems_all": {"at": at}}))
    answers = ladder.read_runs([run], store, FORMS["inference"])
    assert [tuple(point.figures.values()) for point in answers] == [(20.0, 0.1), (40.0, 0.2), (80.0, 0.4)]
