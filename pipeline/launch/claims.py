"""Which Slurm job is to make a key: `$ATOM_HOME/jobs/<key>.json`, so that no stage is ever submitted twice.

Whoever submits holds the lease of that folder, one at a time. A claim counts while Slurm holds a job of that id which
says, in its comment, that it is that very one: a controller that lost its state gives ids again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import AtomError
from pipeline.launch.queue import Job, comment
from pipeline.lease import Lease, holder
from pipeline.store import Store

PATIENCE = 300.0


@dataclass(frozen=True)
class Claim:
    """A job that makes a key, and the run and node that submitted it."""

    key: str
    job: str
    run: str
    node: str

    def holds(self, known: Mapping[str, Job]) -> bool:
        """Whether Slurm has that job, and it has not ended."""
        found = known.get(self.job)
        return found is not None and found.alive and found.comment == comment(self.run, self.node, self.key)


def folder(store: Store) -> Path:
    return store.home / "jobs"


def read(store: Store, key: str) -> Claim | None:
    try:
        return Claim(**json.loads((folder(store) / f"{key}.json").read_text()))
    except FileNotFoundError:
        return None


def write(store: Store, claim: Claim) -> None:
    path = folder(store) / f"{claim.key}.json"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(claim)) + "\n")
    os.replace(draft, path)


def remove(store: Store, key: str) -> None:
    (folder(store) / f"{key}.json").unlink(missing_ok=True)


@contextmanager
def submitting(store: Store) -> Iterator[None]:
    """Waits until no one else submits. Raises AtomError if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while (lease := Lease.take(folder(store))) is None:
        if time.monotonic() > deadline:
            who = holder(folder(store))
            where = f"process {who.pid} on {who.host}" if who else "somebody"
            raise AtomError(f"{where} has been submitting from {store.home} for {PATIENCE:.0f} s; see what it does")
        time.sleep(0.2)
    try:
        yield
    finally:
        lease.release()
