"""Records the Slurm job of a key in `$ATOM_HOME/jobs/<key>.json`, so that no stage is submitted twice.

A submitter holds the lease of that folder. A claim counts while Slurm has a job with that id whose script is that of
the same run and node, because a controller that lost its state assigns ids again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError
from pipeline.core.lease import Lease, holder
from pipeline.core.process import current_user, owner_of
from pipeline.core.store import Store
from pipeline.launch.slurm_client import Job, Owner

# Seconds that a submitter waits for another one, which asks Slurm several times for each stage.
PATIENCE = 300.0


@dataclass(frozen=True)
class Claim:
    """The job of a key, the run and node that submitted it, and the user, who owns the file."""

    key: str
    job: str
    run: str
    node: str
    user: str

    @property
    def owner(self) -> Owner:
        return Owner(self.run, self.node)

    def holds(self, slurm_jobs: Mapping[str, Job]) -> bool:
        """Returns True if Slurm has that job and it has not ended."""
        slurm_job = slurm_jobs.get(self.job)
        return slurm_job is not None and slurm_job.alive and slurm_job.owner == self.owner


def folder(store: Store) -> Path:
    return store.home / "jobs"


class _Claim(TypedDict):
    key: str
    job: str
    run: str
    node: str


_CLAIM: TypeAdapter[Any] = TypeAdapter(_Claim)


def users_of(store: Store, keys: Iterable[str]) -> set[str]:
    """Returns the users whose jobs may make these keys: this one, and the owners of claims."""
    names = {current_user()}
    for key in keys:
        with suppress(OSError):
            names.add(owner_of(folder(store) / f"{key}.json"))
    return names


def read(store: Store, key: str) -> Claim | None:
    """Returns the claim on a key; None without one, or if its file is damaged, which is reported."""
    path = folder(store) / f"{key}.json"
    with json_files.reporting("whether a job makes this key is not known"):
        try:
            return Claim(**json_files.read(path, _CLAIM), user=owner_of(path))
        except FileNotFoundError:
            return None
    return None


def write(store: Store, key: str, owner: Owner, job: str) -> None:
    """Records the job of a key as this user's."""
    claim: _Claim = {"key": key, "job": job, "run": owner.run, "node": owner.node}
    # On disk at once, because a lost claim would let a second job make the same key.
    atomic_files.write(folder(store) / f"{key}.json", json.dumps(claim) + "\n", durable=True)


def remove(store: Store, key: str) -> None:
    (folder(store) / f"{key}.json").unlink(missing_ok=True)


@contextmanager
def submitting(store: Store) -> Iterator[None]:
    """Holds the lease for submitting; waits for another submitter. Raises AtomError after a timeout."""
    deadline = time.monotonic() + PATIENCE
    while (lease := Lease.take(folder(store))) is None:
        if time.monotonic() > deadline:
            lock_holder = holder(folder(store))
            process = f"process {lock_holder.pid} on {lock_holder.host}" if lock_holder else "another process"
            raise AtomError(
                f"{process} has been submitting from {store.home} for {PATIENCE:.0f} s; check it, and submit again"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        lease.release()
