"""The processes that start the stages of this machine with libraries in memory."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.core.progress import Display
from pipeline.core.stage import TRANSFORMERS
from pipeline.core.store import Store
from pipeline.graph import recipe
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.launch import cluster_profile, local
from tests.fixtures import verdict_fixtures


def test_a_stage_finds_its_libraries_in_memory_and_outlives_what_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next stage starts after that process was killed."""
    monkeypatch.setenv("PYTHONPATH", verdict_fixtures.python_path(tmp_path))
    for name, value in {**local.JOB_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    nodes = {}
    for name, way in (("first", "environment"), ("second", "seal")):
        (node,) = verdict_fixtures.graph(tmp_path / name, way, ranks=1).nodes.values()
        stage = dataclasses.replace(node.stage, libraries=TRANSFORMERS)
        nodes[name] = dataclasses.replace(node, name=name, stage=stage, key=f"{name}-0123456789ab")
    store, graph = Store(tmp_path / "home"), Graph(recipe.load("atom-smoke"), nodes)
    run = runs.start(graph, store, [*nodes], "local", {"launcher": "local"})
    profile = cluster_profile.load("local")
    profile = profile.model_copy(update={"local": profile.local.model_copy(update={"jobs": 1})})
    launcher = local.LocalLauncher(graph, store, run, [*nodes], profile, Display(Console(quiet=True)))
    seen = {}

    def watch() -> None:
        while not (tmp_path / "first/child.environ").exists():
            time.sleep(0.05)
        process = launcher.starters[TRANSFORMERS]._process
        assert process
        seen["threads"] = len(list(Path(f"/proc/{process.pid}/task").iterdir()))
        rank = int((tmp_path / "first/pid-0").read_text())
        seen["name"] = Path(f"/proc/{rank}/comm").read_text()
        seen["torch"] = "libtorch" in Path(f"/proc/{rank}/maps").read_text()
        process.kill()
        (tmp_path / "first/go").touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    launcher.go()
    watcher.join()
    # A process with several threads must not fork: a lock that another one holds stays closed in the child.
    assert seen == {"threads": 1, "name": "rank 0\n", "torch": True}
    assert all(store.sealed(node.key) for node in nodes.values())
    assert not any(
        Path(f"/proc/{starter._process.pid}").exists() for starter in launcher.starters.values() if starter._process
    )
