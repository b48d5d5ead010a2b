"""What of `$ATOM_HOME` can go: state of stages that are sealed, what failed attempts left, and code that no job runs.

Artifacts are only named that no recipe of a known run leads to and no release was built from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import ledger
from pipeline import run as runs
from pipeline.errors import AtomError
from pipeline.launch import queue
from pipeline.lease import holder
from pipeline.store import Store


@dataclass(frozen=True)
class Loose:
    """A folder that nothing needs, and why."""

    path: Path
    bytes: int
    why: str

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def loose(store: Store) -> list[Loose]:
    """What can be deleted now, the largest first. Raises AtomError where it is not known what Slurm still runs."""
    known = runs.runs(store)
    latest = {run.body["recipe"]: run for run in known}
    needed = _of_releases(store) | {node["key"] for run in latest.values() for node in run.body["nodes"]}
    code = {run.body["code"] for run in latest.values() if "code" in run.body}
    if any(run.jobs() for run in known):
        try:
            ids = {job.comment.split(" ")[1] for job in queue.held().values() if job.alive}
        except queue.NoAnswer as error:
            raise AtomError(f"{error}; what its jobs still need is not known, so nothing is named") from None
        live = [run for run in known if run.id in ids]
        needed |= {node["key"] for run in live for node in run.body["nodes"]}
        code |= {run.body["code"] for run in live if "code" in run.body}
    found = [*_work(store), *_artifacts(store, _with_inputs(store, needed)), *_code(store, code)]
    return sorted(found, key=lambda row: (-row.bytes, str(row.path)))


def _work(store: Store) -> Iterator[Loose]:
    for folder in sorted((store.home / "work").glob("*")):
        present = holder(folder)
        if present is not None and present.alive:
            continue
        if store.sealed(folder.name):
            yield Loose(folder, _size(folder), "its stage is sealed")
            continue
        for out in sorted(folder.glob("out.*")):
            yield Loose(out, _size(out), "a product that was never finished")


def _with_inputs(store: Store, keys: set[str]) -> set[str]:
    """These keys and all that went into them, directly or not, as their statements say."""
    todo, seen = list(keys), set(keys)
    while todo:
        for _, body in ledger.read(store.ledger, todo.pop()):
            new = set(ledger.material_keys(body).values()) - seen
            seen |= new
            todo.extend(new)
    return seen


def _artifacts(store: Store, needed: set[str]) -> Iterator[Loose]:
    for folder in sorted(store.artifacts.glob("*-*")):
        of = (ledger.phase_of(body) for _, body in ledger.read(store.ledger, folder.name))
        if folder.name not in needed and not needed.intersection(key for key in of if key):
            yield Loose(folder, _size(folder), "no latest run of a recipe and no release leads to it")


def _code(store: Store, needed: set[str]) -> Iterator[Loose]:
    for folder in sorted((store.home / "code").glob("[0-9a-f]*")):
        if folder.name not in needed:
            yield Loose(folder, _size(folder), "no job runs from it")


def _of_releases(store: Store) -> set[str]:
    """The keys of all artifacts that releases were built from."""
    found: set[str] = set()
    for path in (store.home / "releases").glob("*/evidence/manifests/*.json"):
        found.add(str(json.loads(path.read_text())["key"]))
    return found


def _size(folder: Path) -> int:
    """Bytes of the files that nothing else holds: checkpoints share theirs with the phase's artifact."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def delete(rows: list[Loose]) -> int:
    """Deletes them; returns the bytes that became free."""
    for row in rows:
        shutil.rmtree(row.path)
    return sum(row.bytes for row in rows)
