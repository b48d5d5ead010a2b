"""`atom ladder` on runs in `$ATOM_HOME`: what it reads of sealed stages, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.graph import dag
from release.prediction import ladder
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
    points = ladder.read_runs(graphs, store)
    assert len({point.figures["parameters"] for point in points}) == len({p.figures["tokens"] for p in points}) == 3
    size = ladder.size_of(graph("atom-smoke", store.home))
    (row,) = ladder.make(points, [("atom-smoke", size)]).expectations
    assert row.band.value == pytest.approx(loss(size["parameters"], size["tokens"]), rel=1e-3)


def test_other_data_and_missing_runs_are_refused(runs: tuple[Store, list[dag.Graph]], tmp_path: Path) -> None:
    store, graphs = runs
    other = graph(recipe(tmp_path, "s3", tokenizer={"vocab_size": 380}), store.home)
    for added, words in (
        (other, "s3 has other data than s1: its tokenize has another key"),
        (graph("atom-smoke", store.home), "pretrain of atom-smoke is not sealed; run it first: atom run"),
    ):
        with pytest.raises(AtomError, match=words):
            ladder.read_runs([*graphs, added], store)
