"""A home folder as runs leave it, made in milliseconds: real graphs, runs, artifacts, statements and leases of small
files that no stage has made."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import provenance
from pipeline.core.events import FileReport
from pipeline.core.store import Artifact, Store
from pipeline.graph import dag, recipe
from pipeline.graph import run as runs
from pipeline.graph.checkpoints import Checkpoint
from pipeline.graph.dag import Graph
from pipeline.graph.run import Run

SMOKE = Path(recipe.__file__).parents[1] / "recipes" / "atom-smoke.yaml"


@cache
def graphs(folder: Path) -> list[Graph]:
    """Three recipes: two of one name whose pre-training differs, and one of another name that shares the data."""
    out = []
    for name, steps in (("one", 60), ("one", 90), ("two", 120)):
        body = yaml.safe_load(SMOKE.read_text())
        body["name"] = name
        body["pretrain"]["steps"] = steps
        path = folder / f"{name}-{steps}.yaml"
        path.write_text(yaml.safe_dump(body))
        out.append(dag.compose(recipe.load(str(path)), Store(folder / "nowhere")))
    return out


def state(
    store: Store, run: Run, composed: Graph, name: str, product: Artifact, part: Checkpoint | None = None
) -> None:
    """The statement of a product."""
    node = composed.nodes[name]
    materials = {role: store.manifest(key) for role, key in composed.materials(node).items() if store.sealed(key)}
    body = provenance.statement(
        subject={product.key: product.digest},
        stage=node.stage.name,
        version=node.stage.version,
        node=part.node if part else name,
        key=product.key,
        config={},
        operations=[{}],
        materials=materials,
        code={"stages.x": "0" * 64},
        environment={"fingerprint": "f"},
        invocation=f"{run.id}/{name}",
        started=1.0,
        finished=2.0,
        usage={"wall_seconds": 1.0, "cpu_seconds": 3600.0},
        outcome="sealed",
        checkpoint_of={"key": part.phase, "step": part.step} if part else None,
    )
    provenance.write(store.ledger, product.key, body)


def seal(store: Store, run: Run, composed: Graph, name: str) -> None:
    """Seals a node's product, and of a training stage a checkpoint whose file is the product's."""
    key = composed.nodes[name].key
    report = FileReport(run.node_folder(name))
    report.event("start", stage=name, key=key, pid=1, ranks=1)
    report.progress(1, 2, loss=3.5)
    out = store.work(key) / "out.1"
    shutil.rmtree(out, ignore_errors=True)  # of an attempt that was killed, as the worker does
    out.mkdir(parents=True)
    (out / "file").write_text(f"{key}\n" * 100)
    if composed.nodes[name].stage.trains:
        part = Checkpoint(key, 1)
        if not store.sealed(part.key):
            draft = store.work(key) / "out.1@1"
            draft.mkdir()
            os.link(out / "file", draft / "file")
            store.seal(draft, part.key, lambda product: state(store, run, composed, name, product, part))
    store.seal(out, key, lambda product: state(store, run, composed, name, product))
    shutil.rmtree(store.work(key))
    report.event("usage", wall_seconds=1.0)
    report.end("sealed")
    report.close()


def start(store: Store, composed: Graph, selected: list[str], stop_before: str | None = None, **options: Any) -> Run:
    """A run of these nodes that was killed in the middle of `stop_before`, if that is one of them."""
    run = runs.start(composed, store, selected, "local", **options)
    for name in selected:
        key = composed.nodes[name].key
        if name == stop_before:
            for place in (store.work(key) / "state" / "checkpoint", store.work(key) / "out.1"):
                place.mkdir(parents=True, exist_ok=True)
                (place / "file").write_text("x" * 1000)
            report = FileReport(run.node_folder(name))
            report.event("start", stage=name, key=key, pid=1, ranks=1)
            report.close()
            break
        if not store.sealed(key):
            seal(store, run, composed, name)
    return run


def release(store: Store, composed: Graph, selected: list[str]) -> None:
    """What a release keeps of the artifacts that it was built from."""
    evidence = store.home / "releases" / f"{composed.recipe.config.name}-0.1.0" / "evidence"
    shutil.rmtree(evidence, ignore_errors=True)
    (evidence / "manifests").mkdir(parents=True)
    nodes = {}
    for name in selected:
        artifact = store.manifest(composed.nodes[name].key)
        shutil.copy(artifact / "manifest.json", evidence / "manifests" / f"{name}.json")
        nodes[name] = {"key": artifact.key, "digest": artifact.digest}
    (evidence / "release.json").write_text(json.dumps({"format": 2, "nodes": nodes}))
