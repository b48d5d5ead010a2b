"""A run: one execution of a recipe's graph, as files under `logs/<run>/`. Its state is read, never kept in memory."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import AtomError
from pipeline.events import Tail
from pipeline.graph import Graph
from pipeline.lease import holder
from pipeline.recipe import Recipe
from pipeline.store import Store


@dataclass(frozen=True)
class Run:
    """`logs/<id>/run.json` and the folders of its nodes beside it."""

    id: str
    folder: Path
    body: dict[str, Any]

    def node_folder(self, name: str) -> Path:
        return self.folder / name

    def note_job(self, node: str, job: str, attached: bool, array: str | None = None, shards: int = 1) -> None:
        """Writes down which Slurm job is to make a node. attached: another run submitted it; array: the job array that
        does its shards beforehand, so many."""
        row = {"node": node, "job": job, "attached": attached, "array": array, "shards": shards}
        with open(self.folder / "jobs.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def jobs(self) -> dict[str, dict[str, Any]]:
        """{node: {job, attached}} of the latest submissions; empty for a run of this machine."""
        return {row["node"]: row for row in Tail(self.folder / "jobs.jsonl").read()}


def start(graph: Graph, store: Store, selected: list[str], profile: str, **more: Any) -> Run:
    """Writes a new run: the recipe as it is now, and the nodes asked for with keys. more: what a launcher adds."""
    identity = graph.recipe.config
    run_id = f"{identity.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = store.logs / run_id
    folder.mkdir(parents=True)
    for name, data in graph.recipe.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    nodes = [{"name": n, "stage": graph.nodes[n].stage.name, "key": graph.nodes[n].key} for n in selected]
    body = {
        "id": run_id,
        "recipe": identity.name,
        "version": identity.version,
        "recipe_path": str(graph.recipe.path.absolute()),
        "profile": str(Path(profile).absolute()) if Path(profile).is_file() else profile,
        "nodes": nodes,
        **more,
    }
    draft = folder / ".run.json"
    draft.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(draft, folder / "run.json")
    return Run(run_id, folder, body)


def require_same_recipe(run: Run, recipe: Recipe) -> None:
    """Raises AtomError if a recipe file is not what it was when the run began."""
    for name, data in recipe.files.items():
        before = run.folder / name
        if not before.exists() or before.read_bytes() != data:
            raise AtomError(
                f"{name} has changed since run {run.id}; `atom run {recipe.path}` runs what depends on the change"
            )


def runs(store: Store) -> list[Run]:
    """All runs, oldest first."""
    found = []
    for path in store.logs.glob("*/run.json"):
        body = json.loads(path.read_text())
        found.append((path.stat().st_mtime, Run(body["id"], path.parent, body)))
    return [run for _, run in sorted(found, key=lambda item: (item[0], item[1].id))]


def find(store: Store, reference: str | None) -> Run:
    """The run whose id starts with `reference`, or the latest. Raises AtomError if there is none, or several."""
    known = runs(store)
    if not known:
        raise AtomError(f"there is no run under {store.logs}; start one with `atom run RECIPE`, or set ATOM_HOME")
    if reference is None:
        return known[-1]
    matching = [run for run in known if run.id.startswith(reference)]
    if len(matching) != 1:
        which = f"{len(matching)} runs under {store.logs} begin" if matching else f"no run under {store.logs} begins"
        raise AtomError(f"{which} with {reference}; the latest is {known[-1].id}")
    return matching[0]


@dataclass(frozen=True)
class NodeStatus:
    """What the files say of one node of a run."""

    name: str
    key: str
    state: str  # sealed | running | failed | waiting; of a Slurm job also as Slurm says it, or lost
    done: int = 0
    total: int = 0
    unit: str = ""
    figures: dict[str, float] | None = None
    seconds: float | None = None
    ranks: int | None = None
    eta: float | None = None  # seconds
    job: str | None = None  # of Slurm, and so is what follows
    nodes: str | None = None
    elapsed: str | None = None
    restarts: int | None = None
    reason: str | None = None
    message: str = ""
    kind: str | None = None  # of the failure that `message` tells

    def json(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v not in (None, "")}


def node_status(run: Run, store: Store, node: dict[str, str]) -> NodeStatus:
    """Reads artifact, lease and events; the artifact outranks the rest."""
    name, key = node["name"], node["key"]
    events = Tail(run.node_folder(name) / "events.jsonl").read()
    progress: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "progress"), {})
    begun: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "start"), {})
    usage: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "usage"), {})
    end = events[-1] if events and events[-1]["event"] == "end" else None
    known = {"time", "event", "done", "total", "unit"}
    common: dict[str, Any] = {
        "done": progress.get("done", 0),
        "total": progress.get("total", 0),
        "unit": progress.get("unit", ""),
        "figures": {k: v for k, v in progress.items() if k not in known} or None,
        "seconds": usage.get("wall_seconds"),
        "ranks": begun.get("ranks"),
        "eta": _eta(events),
    }
    if store.sealed(key):
        return NodeStatus(name, key, "sealed", **common)
    present = holder(store.work(key)) if store.work(key).exists() else None
    if present is not None and present.alive:
        return NodeStatus(name, key, "running", **common)
    if end is not None and end["outcome"] not in ("busy", "sealed"):
        return NodeStatus(name, key, "failed", **common, message=end["outcome"], kind=end.get("kind"))
    if events and events[-1]["event"] != "end":
        return NodeStatus(name, key, "failed", **common, message="its process is gone; run the same command to go on")
    return NodeStatus(name, key, "waiting", **common)


def _eta(events: list[dict[str, Any]]) -> float | None:
    """Seconds to the end by the pace of the present attempt; None if it has not gone far enough to tell."""
    start = next((i for i, e in reversed(list(enumerate(events))) if e["event"] == "start"), 0)
    points = [e for e in events[start:] if e["event"] == "progress"]
    if len(points) < 2 or points[-1]["done"] <= points[0]["done"]:
        return None
    pace = (points[-1]["time"] - points[0]["time"]) / (points[-1]["done"] - points[0]["done"])
    return round(float(max(0, points[-1]["total"] - points[-1]["done"]) * pace), 1)


def status(run: Run, store: Store) -> list[NodeStatus]:
    return [node_status(run, store, node) for node in run.body["nodes"]]
