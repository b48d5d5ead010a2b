"""Whatever ends a stage of several ranks on this machine ends all of its processes within seconds, with its sentence."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.core import provenance
from pipeline.core.errors import AtomError, CheckFailed, Kind
from pipeline.core.lease import holder
from pipeline.core.progress import Display
from pipeline.core.store import Store
from pipeline.graph import recipe
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.launch import cluster_profile
from pipeline.launch.local import LocalLauncher
from tests.fixtures import verdict_fixtures
from tests.fixtures.run_fixtures import at_length

WAYS = [
    ("kill", 3, Kind.MACHINE, "rank 3: its process is gone, perhaps killed for memory"),
    ("abandon", 2, Kind.MACHINE, "rank 2: no step was finished for 5 s"),
]
AT_LENGTH = [
    ("collective", 1, Kind.BUG, "rank 1: a bug in stage failing: KeyError"),
    ("check", 1, Kind.CHECK, "rank 1: the weights that come back are others"),
    ("user", 0, Kind.USER, "recipe r: this cannot be"),
    ("abandon", 0, Kind.MACHINE, "no step was finished for 5 s"),
]
CASES = [
    *(pytest.param(*way, id=f"{way[0]}-{way[1]}") for way in WAYS),
    *(pytest.param(*way, id=f"{way[0]}-{way[1]}", marks=at_length("training", 10)) for way in AT_LENGTH),
]


@pytest.mark.parametrize(("way", "failing_rank", "kind", "sentence"), CASES)
def test_a_failure_of_one_rank_ends_all_within_seconds(
    way: str, failing_rank: int, kind: Kind, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", verdict_fixtures.python_path(tmp_path))
    store, graph = Store(tmp_path / "home"), verdict_fixtures.graph(tmp_path / "act", way, failing_rank)
    (name,) = graph.nodes
    run = runs.start(graph, store, [name], "local", {"launcher": "local"})
    ends: list[verdict_fixtures.End] = []

    def watch() -> None:
        while not (launches := list(run.node_folder(name).glob("ranks/*"))):
            time.sleep(0.05)
        ends.append(verdict_fixtures.last_end(launches[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    display = Display(Console(quiet=True))
    with pytest.raises(AtomError) as error:
        LocalLauncher(graph, store, run, [name], cluster_profile.load("local"), display).go()
    watcher.join(60)
    ends[0].require_promise(name, (tmp_path / "act" / "acted").stat().st_mtime)
    assert error.value.kind is kind and isinstance(error.value, CheckFailed) == (kind is Kind.CHECK)
    assert error.value.exit_code == (1 if kind is Kind.CHECK else 2)
    assert sentence in str(error.value)
    (stage,) = runs.status(run, store)
    assert stage.state == "failed" and stage.kind == kind and sentence in stage.message, stage
    ((_, statement),) = provenance.read(store.ledger, graph.nodes[name].key)
    assert sentence in provenance.outcome(statement) and provenance.kind(statement) == kind
    present = holder(store.work(graph.nodes[name].key))
    assert present and not present.alive and not list(store.work(graph.nodes[name].key).glob("out.*"))


def test_no_later_stage_takes_the_slots_that_one_of_two_ranks_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", verdict_fixtures.python_path(tmp_path))
    nodes = {}
    for name, way, ranks in (("first", "environment", 1), ("wide", "seal", 2), ("short", "seal", 1)):
        (node,) = verdict_fixtures.graph(tmp_path / name, way, ranks=ranks).nodes.values()
        nodes[name] = dataclasses.replace(node, name=name, key=f"{name}-0123456789ab")
    store, graph = Store(tmp_path / "home"), Graph(recipe.load("atom-smoke"), nodes)
    run = runs.start(graph, store, [*nodes], "local", {"launcher": "local"})
    started: list[str] = []

    class Recording(Display):
        def started(self, name: str, log: str, ranks: int = 1) -> None:
            started.append(name)

    # The first stage ends only after the launcher could have started the short one beside it.
    threading.Timer(3.0, (tmp_path / "first/go").touch).start()
    LocalLauncher(graph, store, run, [*nodes], cluster_profile.load("local"), Recording(Console(quiet=True))).go()
    assert started == ["first", "wide", "short"]
