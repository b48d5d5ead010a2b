"""Finds the data of `$ATOM_HOME` that can be removed.

It is the state of sealed stages, leftovers of failed attempts, and data that no run references. Every artifact that a
run of any age and recipe references, or that a release was built from, is kept. Products of training stages, including
checkpoints of unfinished ones, and predictions are removed only by name. If a file with references is unreadable,
everything that it might reference is kept.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files, provenance
from pipeline.core.errors import AtomError
from pipeline.core.json_files import Damaged
from pipeline.core.lease import Lease, holder
from pipeline.core.store import Store
from pipeline.graph import registry
from pipeline.graph import run as runs
from pipeline.graph.run import Run
from pipeline.launch import slurm_client, submission_lock
from pipeline.launch.attempt import PREDICTION, prediction_key
from pipeline.launch.slurm_client import Job

KEY = re.compile(r"[A-Za-z0-9][\w@.-]*-[0-9a-f]{12}")
CODE = re.compile(r"[0-9a-f]{16}")
PRODUCT = re.compile(r"out\.\S+")


class _Keyed(TypedDict):
    key: str


class _Release(TypedDict):
    nodes: Annotated[dict[str, _Keyed], Field(min_length=1)]


_KEYED: TypeAdapter[Any] = TypeAdapter(_Keyed)
_RELEASE: TypeAdapter[Any] = TypeAdapter(_Release)


@dataclass(frozen=True)
class Loose:
    """An unused folder."""

    path: Path
    bytes: int  # that become free if all listed folders are removed
    why: str

    def json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "why": self.why}


@dataclass
class Needed:
    """The data that runs and releases reference."""

    keys: set[str] = field(default_factory=set)
    code: set[str] = field(default_factory=set)
    # The stage of each key in a run.
    stages: dict[str, str] = field(default_factory=dict)
    # The reasons why further references may be unknown.
    doubts: list[str] = field(default_factory=list)

    def doubt(self, error: Damaged, consequence: str) -> None:
        json_files.report(error, "every artifact and all code is kept, since it may have needed them")
        self.doubts.append(f"{json_files.printable(error.path)}: {consequence}")


def loose(store: Store, named: Sequence[str] = ()) -> tuple[list[Loose], list[str]]:
    """Returns the removable folders, the largest first, and notes on unreferenced ones that are kept, with the reason.

    Args:
        store: The home.
        named: Keys to remove in spite of references.

    Raises:
        AtomError: An unfinished job needs one of them.
    """
    all_runs, damaged = _read_runs(store)
    needed = _needed_by_runs(store, all_runs)
    for error in damaged:
        needed.doubt(error, "what that run needs is not known")
    _add_needed_by_releases(store, needed)
    needed.keys |= {prediction_key(key) for key in needed.keys}  # of a run that began after it
    for run in all_runs:
        needed.stages |= {row["key"]: row["stage"] for row in run.body["nodes"]}
    keys = {_match_prefix(name, [*_names(store.artifacts, KEY), *_names(store.home / "work", KEY)]) for name in named}
    _require_idle(store, all_runs, keys)
    rows = [*_loose_work(store, needed, keys), *_loose_artifacts(store, needed, keys), *_loose_code(store, needed)]
    sizes = freed(path for path, _ in rows)
    loose_folders = [Loose(path, sizes[path], reason) for path, reason in rows]
    notes = list(needed.doubts)
    for key in _names(store.artifacts, KEY) if not needed.doubts else ():
        if key not in keys and not _is_needed(store, key, needed) and _is_trained(store, key, needed):
            notes.append(f"{key} is kept, since {_why_kept(key)}; --include {key} names it")
    return sorted(loose_folders, key=lambda row: (-row.bytes, str(row.path))), notes


def delete(store: Store, confirmed: Collection[Path], named: Sequence[str] = ()) -> list[Loose]:
    """Deletes removable folders, and what an interrupted deletion left. Submissions are locked out meanwhile.

    The folders are first moved to `$ATOM_HOME/trash`, so that a kill leaves no half of an artifact in its place. What a
    run that began meanwhile references is moved back, unless the run has made it again.

    Args:
        store: The home.
        confirmed: The folders that may be deleted; others that `loose` would list by now stay.
        named: As for `loose`.

    Returns:
        The deleted folders.

    Raises:
        AtomError: As `loose`, or the trash is a link.
    """
    trash = store.home / "trash"
    if trash.is_symlink():
        raise AtomError(f"{trash} is a link, and nothing is deleted through it; remove the link")
    with submission_lock.submitting(store):
        # `atom run` takes no lock: a run may begin while the folders are moved, and reference them.
        run_ids = {run.id for run in _read_runs(store)[0]}
        rows = [row for row in loose(store, named)[0] if row.path in confirmed]
        trash.mkdir(exist_ok=True)
        moved = {row: target for row in rows if (target := _move(store, row.path, trash)) is not None}
        newly_needed = _needed_by_runs(store, [run for run in _read_runs(store)[0] if run.id not in run_ids])
        for row in [row for row in moved if row.path.name in newly_needed.keys | newly_needed.code]:
            if not os.path.lexists(row.path):
                os.rename(moved[row], row.path)
            del moved[row]
        # With the folders that an interrupted deletion left there.
        shutil.rmtree(trash)
    return list(moved)


def _move(store: Store, path: Path, trash: Path) -> Path | None:
    """Moves a folder and returns its new path; None if it has disappeared, or if it is work whose lease is held."""
    kind, name = path.relative_to(store.home).parts[:2]
    # A worker may have begun since the folder was listed.
    lease = None
    if kind == "work" and (lease := Lease.take(store.work(name))) is None:
        return None
    try:
        return path.rename(trash / uuid.uuid4().hex) if os.path.lexists(path) else None
    finally:
        if lease is not None:
            lease.release()


def freed(paths: Iterable[Path]) -> dict[Path, int]:
    """Computes the bytes that become free if all of these paths are removed.

    A file counts only if all of its hard links are below the paths, and then once, at the path of its first link.
    """
    links: Counter[tuple[int, int]] = Counter()
    first_link: dict[tuple[int, int], tuple[Path, os.stat_result]] = {}
    bytes_by_path: dict[Path, int] = {}
    for path in paths:
        bytes_by_path[path] = 0
        for root, _, names in () if path.is_symlink() else os.walk(path):
            for entry in (os.lstat(os.path.join(root, name)) for name in names):
                inode = (entry.st_dev, entry.st_ino)
                links[inode] += 1
                first_link.setdefault(inode, (path, entry))
    for inode, (path, entry) in first_link.items():
        if links[inode] == entry.st_nlink:
            bytes_by_path[path] += entry.st_size
    return bytes_by_path


def _read_runs(store: Store) -> tuple[list[Run], list[Damaged]]:
    try:
        return runs.read_all(store)
    except Damaged as error:
        return [], [error]


def _match_prefix(name: str, names: Iterable[str]) -> str:
    """Returns the only name that starts with the prefix. Raises AtomError."""
    matching = sorted({candidate for candidate in names if candidate.startswith(name)})
    if name in matching:
        return name
    if len(matching) != 1:
        fits = f"fits {', '.join(matching)}; write the one that is meant" if matching else "is not there"
        raise AtomError(f"{name} {fits}")
    return matching[0]


def _needed_by_runs(store: Store, run_list: list[Run]) -> Needed:
    """Returns the references of these runs: their stages, the code of their jobs, and all inputs of the stages."""
    needed = Needed()
    inputs: dict[str, set[str]] = {}
    for run in run_list:
        needed.keys |= {row["key"] for row in run.body["nodes"]}
        needed.code |= {run.body["code"]} if "code" in run.body else set()
        inputs |= {row["key"]: set(row["inputs"].values()) for row in run.body["nodes"] if "inputs" in row}
    # Inputs of inputs, by the run's file or by the statements of whoever made the artifact.
    pending = list(needed.keys)
    while pending:
        key = pending.pop()
        statements, damaged = provenance.statements(store.ledger, key)
        if key in inputs or statements:
            for error in damaged:
                json_files.report(error, "this statement is left out")
        else:
            damage = Damaged(store.ledger / key, "it holds no statement")
            needed.doubt(next(iter(damaged), damage), f"what goes into {key} is not known")
        if key not in inputs:
            inputs[key] = {input_key for _, body in statements for input_key in provenance.material_keys(body).values()}
            inputs[key] |= {phase for _, body in statements if (phase := provenance.phase_of(body))}
        pending += inputs[key] - needed.keys
        needed.keys |= inputs[key]
    return needed


def _add_needed_by_releases(store: Store, needed: Needed) -> None:
    """Adds the artifacts that releases were built from."""
    try:
        releases = [store.home / "releases" / name for name in json_files.names(store.home / "releases")]
    except Damaged as error:
        return needed.doubt(error, "what its releases were built from is not known")
    for evidence in (release / "evidence" for release in releases if not _is_beside(release)):
        try:
            json_files.names(evidence.parent)  # raises for anything but a folder, and for a dangling link
            release_info = json_files.read(evidence / "release.json", _RELEASE)
            needed.keys |= {node["key"] for node in release_info["nodes"].values()}
            for name in os.listdir(evidence / "manifests"):
                needed.keys.add(json_files.read(evidence / "manifests" / name, _KEYED)["key"])
        except FileNotFoundError as error:
            needed.doubt(Damaged(Path(error.filename), "it is missing"), "what it was built from is not known")
        except OSError as error:
            needed.doubt(Damaged(Path(error.filename), str(error.strerror)), "what it was built from is not known")
        except Damaged as error:
            needed.doubt(error, "what that release was built from is not known")


def _is_beside(path: Path) -> bool:
    """Returns True if an entry of the folder of releases is no release.

    It is hidden, or a file or folder that publications and replays leave beside a release.
    """
    is_file, is_folder = path.is_file() and not path.is_symlink(), path.is_dir() and not (path / "evidence").exists()
    beside = (is_file and path.name.endswith(".publish.jsonl")) or (is_folder and path.name.endswith(".replays"))
    return path.name.startswith(".") or beside


def _require_idle(store: Store, run_list: list[Run], keys: set[str]) -> None:
    """Raises AtomError if an unfinished run needs one of these keys."""
    for run in run_list if keys else ():
        needed = sorted(keys & _needed_by_runs(store, [run]).keys)
        if needed and (reason := _why_active(store, run)):
            raise AtomError(f"{needed[0]} is needed by run {run.id}, {reason}; stop it first: atom cancel {run.id}")


def _why_active(store: Store, run: Run) -> str | None:
    """Returns the reason why a run may be unfinished; None if it is finished."""
    if all(store.sealed(row["key"]) for row in run.body["nodes"]):
        return None
    folders = [run.folder / "driver", *(store.work(row["key"]) for row in run.body["nodes"])]
    if any(lease_holder is not None and lease_holder.alive for lease_holder in map(holder, folders)):
        return "which is running"
    if run.on_slurm:
        try:
            slurm_jobs = slurm_client.queued_jobs(run.users())
        except slurm_client.NoAnswer as error:
            return f"whose jobs are not known ({error})"
        job_ids = {str(row["job"]) for row in run.jobs().values()}
        if any(job.alive and (id in job_ids or _is_of(job, run)) for id, job in slurm_jobs.items()):
            return "which Slurm has jobs of"
    return None


def _is_of(job: Job, run: Run) -> bool:
    return job.owner is not None and job.owner.run == run.id


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    names: list[str] = []
    with json_files.reporting("nothing there is named"):
        names = [name for name in json_files.names(folder) if pattern.fullmatch(name)]
    return names


def _is_needed(store: Store, key: str, needed: Needed) -> bool:
    """Returns True if a run or release references a key, or the phase of the checkpoint with that key."""
    statements = provenance.statements(store.ledger, key)[0] if "@" in key else ()
    return key in needed.keys or any(provenance.phase_of(body) in needed.keys for _, body in statements)


def _why_kept(key: str) -> str:
    if key.startswith(f"{PREDICTION}-"):
        return "a prediction is sealed once, before its run begins"
    return "it was trained or it is not known what made it"


def _is_trained(store: Store, key: str, needed: Needed) -> bool:
    """Returns True if a key belongs to a training stage, a checkpoint or an unknown stage."""
    names = {needed.stages[key]} if key in needed.stages else set()
    if not names and "@" not in key:
        statements = provenance.statements(store.ledger, key)[0]
        names = {provenance.parameters_of(body)["stage"] for _, body in statements}
    return not names or any(name not in registry.stages() or registry.stage(name).trains for name in names)


def _loose_work(store: Store, needed: Needed, named: set[str]) -> Iterator[tuple[Path, str]]:
    for name in _names(store.home / "work", KEY):
        folder = store.work(name)
        lease_holder = holder(folder)
        if lease_holder is not None and lease_holder.alive:
            continue
        if name in named:
            yield folder, "it was named"
        elif _is_trained(store, name, needed):
            continue
        elif store.sealed(name) and store.damage(name) is None:
            yield folder, "its stage is sealed"
        else:
            with suppress(Damaged):  # `holder` has reported it
                unfinished = [product for product in json_files.names(folder) if PRODUCT.fullmatch(product)]
                yield from ((folder / product, "a product that was never finished") for product in unfinished)


def _loose_artifacts(store: Store, needed: Needed, named: set[str]) -> Iterator[tuple[Path, str]]:
    for key in _names(store.artifacts, KEY):
        with json_files.reporting("what needs this artifact cannot be run"):
            store.manifest(key)
        if key in named:
            yield store.artifacts / key, "it was named"
        elif key not in needed.keys and not needed.doubts and not _is_trained(store, key, needed):
            yield store.artifacts / key, "no run and no release references it"


def _loose_code(store: Store, needed: Needed) -> Iterator[tuple[Path, str]]:
    for name in _names(store.home / "code", CODE):
        if name not in needed.code and not needed.doubts:
            yield store.home / "code" / name, "no run has jobs that run from it"
