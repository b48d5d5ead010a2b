"""Nodes at which a start failed, in `$ATOM_HOME/nodes/<node>.json`: later starts avoid them until the entry expires.

One file for each node, replaced as a whole, so that two writers cannot mix their lines and the last one wins. The
writers are rank 0 of a job, for a fault that a rank sees on its node (preflight, device), and the job's script
(post_mortem.sh.jinja), for a node on which Python did not start or that lost its rank twice. Readers need neither
Slurm's accounting nor its queue, so other people's runs see the entries, too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError
from pipeline.core.progress import duration
from pipeline.core.store import Store
from pipeline.graph.run import Name


class _Entry(TypedDict):
    until: Annotated[int, Field(ge=0, lt=2**53)]
    node: Name
    evidence: str
    run: str
    stage: str
    job: str


_ENTRY: TypeAdapter[Any] = TypeAdapter(_Entry)


@dataclass(frozen=True)
class BadNode:
    """A node to avoid, and the start that failed there. The job's script parses the file: `until` is its first field.

    Attributes:
        until: Seconds since 1970 until which the node is avoided.
        node: Name of the node.
        evidence: What went wrong there.
        run: The run.
        stage: The stage that started there.
        job: Its Slurm job.
    """

    until: int
    node: str
    evidence: str
    run: str
    stage: str
    job: str

    @property
    def sentence(self) -> str:
        """One sentence: the node, the reason, for how long it is avoided, and the command that ends that."""
        remaining = duration(max(0.0, self.until - time.time()))
        return (
            f"node {self.node} is avoided for another {remaining} (stage {self.stage}, job {self.job}: "
            f"{self.evidence}); once it is repaired: atom nodes clear {self.node}"
        )


def folder(store: Store) -> Path:
    return store.home / "nodes"


def read(store: Store) -> list[BadNode]:
    """Returns the nodes to avoid now, by name. A damaged file is reported, and its node is not avoided."""
    now = time.time()
    return [entry for entry in _entries(store) if entry.until > now]


def _entries(store: Store) -> list[BadNode]:
    """Returns all entries, by the name of the node. A damaged one is reported."""
    names: list[str] = []
    with json_files.reporting("no node is avoided"):
        names = [name for name in json_files.names(folder(store)) if re.fullmatch(r"[^.].*\.json", name)]
    entries = []
    for name in names:
        body = json_files.read_optional(folder(store) / name, _ENTRY, "that node is not avoided")
        if body and name == f"{body['node']}.json":
            entries.append(BadNode(**body))
    return sorted(entries, key=lambda entry: entry.node)


def record(store: Store, entry: BadNode) -> None:
    """Writes the entry of a node, in the place of an earlier one, and removes those that have expired.

    Raises OSError.
    """
    folder(store).mkdir(exist_ok=True)
    for known in _entries(store):
        if known.until <= time.time():
            (folder(store) / f"{known.node}.json").unlink(missing_ok=True)
    atomic_files.write(folder(store) / f"{entry.node}.json", json.dumps(asdict(entry)) + "\n")


def clear(store: Store, nodes: Iterable[str]) -> list[str]:
    """Removes the entries of these nodes, or of all if none is named; returns the names.

    Raises AtomError, before any is removed, if one is not avoided.
    """
    avoided = {entry.node for entry in read(store)}
    if unknown := sorted(set(nodes) - avoided):
        listed = ", ".join(sorted(avoided)) or "none"
        raise AtomError(f"node {unknown[0]} is not avoided; those that are: {listed} (atom nodes)")
    cleared = sorted(set(nodes) or avoided)
    for node in cleared:
        (folder(store) / f"{node}.json").unlink(missing_ok=True)
    return cleared
