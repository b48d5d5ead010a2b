"""A run: one execution of a recipe's graph, as files under `logs/<run>/`.

Its state is in the files, never in memory.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files, process
from pipeline.core.environment import code_root, git_commit
from pipeline.core.errors import AtomError, Kind
from pipeline.core.events import Tail, figures_of
from pipeline.core.json_files import Damaged
from pipeline.core.lease import holder
from pipeline.core.log_summary import EventSummary
from pipeline.core.progress import duration, figures_text
from pipeline.core.store import Store
from pipeline.graph.dag import Graph
from pipeline.graph.recipe import Recipe

NAME = r"^[A-Za-z0-9][\w@.-]*$"
# Of a run, a node or an artifact: one part of a path.
Name = Annotated[str, Field(pattern=NAME)]


class NodeRow(TypedDict):
    """A stage of a run; `inputs` has the keys of its inputs by role."""

    name: Name
    stage: str
    key: Name
    inputs: NotRequired[dict[str, Name]]


class Prices(TypedDict):
    gpu_hour: float
    core_hour: float
    currency: str


class Limits(TypedDict):
    """The budget of a recipe, as jobs carry it; None: no limit."""

    gpu_hours: float | None
    core_hours: float | None


class LauncherFields(TypedDict):
    """The fields that a launcher adds to run.json."""

    launcher: Literal["local", "slurm"]
    """where the stages run, whatever has become of their jobs"""
    prices: NotRequired[Prices | None]
    """prices of the profile"""
    cluster: NotRequired[str]
    """on Slurm, the name of the profile"""
    code: NotRequired[Name]
    """on Slurm, the digest of the code snapshot that the jobs run from"""


class Body(LauncherFields):
    """The content of run.json."""

    id: Name
    """name of the folder"""
    recipe: str
    """name of the recipe"""
    version: str
    """version of the recipe"""
    recipe_path: str
    """file of the recipe"""
    profile: str
    """name or file of the cluster profile"""
    nodes: Annotated[list[NodeRow], Field(min_length=1)]
    """requested nodes; `inputs` are keys by role, absent in older runs"""
    commit: NotRequired[str | None]
    """commit of the checkout that the run began from; absent in runs before 2026-11-28"""
    dirty: NotRequired[bool]
    """whether that checkout was changed since"""
    budget: NotRequired[Limits | None]
    """budget of the recipe in hours; null: no limit"""
    refused: NotRequired[str]
    """one sentence about a submission that Slurm refused"""


class JobRow(TypedDict):
    """A line of jobs.jsonl: the Slurm job of a node."""

    node: Name
    """name of the node"""
    job: str
    """its Slurm job"""
    attached: bool
    """true if another run submitted the job, perhaps of another user"""
    user: NotRequired[str]
    """owner of the job, if it is not that of the run"""
    array: NotRequired[str | None]
    """job array that processes its shards first"""
    shards: NotRequired[int]
    """number of shards"""
    servers: NotRequired[list[str]]
    """job arrays of its servers"""


# The message about a stage that recorded no end.
CUT_OFF = "its process is gone; run the same command to go on"
# The state of the stages whose jobs were not submitted.
REFUSED = "refused"
BODY = TypeAdapter(Body)
JOB: TypeAdapter[JobRow] = TypeAdapter(JobRow)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with one folder for each node."""

    id: str
    folder: Path

    def node_folder(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True)
class Run(RunFolder):
    """`logs/<id>/run.json` and the folders of its nodes beside it."""

    body: Body

    def note_job(
        self,
        node: str,
        job: str,
        attached: bool,
        array: str | None = None,
        shards: int = 1,
        servers: list[str] | None = None,
        user: str | None = None,
    ) -> None:
        """Records the Slurm job of a node, durably: a row of jobs.jsonl."""
        row: JobRow = {"node": node, "job": job, "attached": attached, "array": array, "shards": shards}
        if servers is not None:
            row["servers"] = servers
        if user is not None and user != self.owner:
            row["user"] = user
        path = self.folder / "jobs.jsonl"
        is_new = not path.exists()
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            atomic_files.flush(self.folder)

    def refuse(self, sentence: str) -> None:
        """Records that its jobs were not submitted, or were cancelled right away."""
        body = self.body.copy()
        body["refused"] = sentence
        _write_body(self.folder, body)

    @property
    def on_slurm(self) -> bool:
        return self.body["launcher"] == "slurm"

    def users(self) -> set[str]:
        """Returns the users whose jobs it waits for. Raises OSError."""
        return {self.owner, *(row["user"] for row in self.jobs().values() if "user" in row)}

    @property
    def owner(self) -> str:
        """The user who began it. Raises OSError."""
        return process.owner_of(self.folder / "run.json")

    def jobs(self) -> dict[str, JobRow]:
        """Returns the latest submission of each node; empty for a local run."""
        tail = Tail(self.folder / "jobs.jsonl", JOB)
        rows = {row["node"]: row for row in tail.read()}
        if tail.cut:
            json_files.report(Damaged(tail.path, "its last line is cut"), "that job is not known")
        elif not rows and tail.path.is_file() and not tail.offset:
            json_files.report(Damaged(tail.path, "it is empty"), "the run's jobs are not known")
        return rows


def start(graph: Graph, store: Store, selected: list[str], profile: str, launcher_fields: LauncherFields) -> Run:
    """Writes a new run: the present recipe, and the selected nodes with keys."""
    identity = graph.recipe.config
    # The time makes the ids of a recipe sort by age; the random part tells apart runs that begin in one second.
    run_id = f"{identity.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = store.logs / run_id
    folder.mkdir(parents=True)
    for name, data in graph.recipe.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, data, durable=True)
    nodes: list[NodeRow] = [
        {"name": node.name, "stage": node.stage.name, "key": node.key, "inputs": graph.materials(node)}
        for node in (graph.nodes[name] for name in selected)
    ]
    commit, dirty = _commit()
    body: Body = {
        "id": run_id,
        "recipe": identity.name,
        "version": identity.version,
        "recipe_path": str(graph.recipe.path.absolute()),
        "profile": str(Path(profile).absolute()) if Path(profile).is_file() else profile,
        "nodes": nodes,
        "commit": commit,
        "dirty": dirty,
        "budget": None if identity.budget is None else {**identity.budget.model_dump()},  # type: ignore[typeddict-item]
        **launcher_fields,  # type: ignore[typeddict-item]
    }
    # After all other files, because a folder with a run.json is a complete run.
    _write_body(folder, body)
    atomic_files.flush(store.logs)
    return Run(run_id, folder, body)


def _write_body(folder: Path, body: Body) -> None:
    atomic_files.write(folder / "run.json", json.dumps(body, indent=1) + "\n", durable=True)


@cache
def _commit() -> tuple[str | None, bool]:
    """Returns the commit of this process's code, and whether it was changed since."""
    return git_commit(code_root())


def require_same_recipe(run: Run, recipe: Recipe) -> None:
    """Raises AtomError if a recipe file has changed since the start of the run."""
    for name, data in recipe.files.items():
        before = run.folder / name
        if not before.exists() or before.read_bytes() != data:
            raise AtomError(
                f"{name} has changed since run {run.id}; `atom run {recipe.path}` runs what depends on the change"
            )


def read_all(store: Store) -> tuple[list[Run], list[Damaged]]:
    """Returns all runs, oldest first, and the unreadable ones."""
    dated_runs, damaged = [], []
    for name in json_files.names(store.logs):
        path = store.logs / name / "run.json"
        try:
            body = json_files.read(path, BODY)
            if body["id"] != name:
                raise Damaged(path, f"it says that it is of run {body['id']}")
            dated_runs.append((path.stat().st_mtime, Run(name, path.parent, body)))
        except FileNotFoundError:
            if path.parent.is_symlink() and not path.parent.exists():  # perhaps its disk is not mounted
                damaged.append(Damaged(path, "its folder is a link that leads nowhere"))
            elif path.parent.is_symlink() or _has_begun(path.parent):
                damaged.append(Damaged(path, "it is missing"))
        except Damaged as error:
            damaged.append(error)
    return [run for _, run in sorted(dated_runs, key=lambda item: (item[0], item[1].id))], damaged


def _written(path: Path) -> float:
    """Returns the time at which a run.json was written; that of its folder if it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return path.parent.lstat().st_mtime


def _has_begun(folder: Path) -> bool:
    """Returns True if a run has files that are written after its run.json, which is then lost.

    These are files of a launcher or a stage, or a link to them. Without such files, the run was killed before it began.
    """
    later = ("driver", "jobs.jsonl", "*/events.jsonl", "*/submitit", "*/shards/submitit", "*/servers/submitit")
    if not folder.is_dir():
        return False
    return any(any(folder.glob(pattern)) for pattern in later) or any(path.is_symlink() for path in folder.iterdir())


def runs(store: Store) -> list[Run]:
    """Returns all readable runs, oldest first; the others are reported."""
    try:
        readable, damaged = read_all(store)
    except Damaged as error:
        json_files.report(error, "no run is known")
        return []
    for damage in damaged:
        json_files.report(damage, "that run is left out")
    return readable


def find(store: Store, reference: str | None) -> Run:
    """Returns the run whose id starts with `reference`, or the latest.

    Raises AtomError if there is none, if there are several, or if it is unreadable.
    """
    readable, damaged = read_all(store)
    for damage in damaged:
        id = damage.path.parent.name
        if reference is not None and id.startswith(reference):
            raise damage
        if reference is None and (not readable or _written(damage.path) > _written(readable[-1].folder / "run.json")):
            others = f"name another, such as {readable[-1].id}, or " if readable else ""
            raise Damaged(damage.path, damage.why, f"{id} is the latest run: {others}remove its folder")
    for damage in damaged:
        json_files.report(damage, "that run is left out")
    if not readable:
        raise AtomError(f"there is no run under {store.logs}; start one with `atom run RECIPE`, or set ATOM_HOME")
    if reference is None:
        return readable[-1]
    matching = [run for run in readable if run.id.startswith(reference)]
    if len(matching) != 1:
        which = f"{len(matching)} runs under {store.logs} begin" if matching else f"no run under {store.logs} begins"
        raise AtomError(f"{which} with {reference}; the latest is {readable[-1].id}")
    return matching[0]


@dataclass(frozen=True)
class NodeStatus:
    """The status of one node of a run, from its files.

    Attributes:
        name: Name of the node.
        key: Its key.
        state: One of the states below.
        done: Finished units of its work.
        total: All units of its work.
        unit: The unit, such as steps.
        figures: The last figures of its progress, such as loss.
        seconds: Seconds of all attempts.
        ranks: Processes that run the stage.
        eta: Remaining seconds.
        job: Id of its Slurm job.
        user: User of the job, if that is not the run's owner.
        nodes: Nodes of the job.
        elapsed: Time that the job has run, as Slurm states it.
        restarts: Number of attempts after the first one.
        reason: Why the job waits, in the words of Slurm or in one sentence.
        servers: How many of its servers run, and how many wait.
        slow: One sentence on the rank for which the others wait.
        alert: The cause for which the job waits, if a person must act.
        last_report: Time of the last event, in seconds since 1970.
        message: One sentence on a failure.
        kind: Kind of the failure in `message`.
        events: Summary of its events; `json` leaves it out.
    """

    name: str
    key: str
    state: str
    done: float = 0
    total: float = 0
    unit: str = ""
    figures: dict[str, float] | None = None
    seconds: float | None = None
    ranks: int | None = None
    eta: float | None = None
    job: str | None = None
    user: str | None = None
    nodes: str | None = None
    elapsed: str | None = None
    restarts: int | None = None
    reason: str | None = None
    servers: str | None = None
    slow: str | None = None
    alert: str | None = None
    last_report: float | None = None
    message: str = ""
    kind: str | None = None
    events: EventSummary | None = field(default=None, repr=False, compare=False)

    @property
    def detail(self) -> str:
        """The state of the stage in one line of words."""
        servers = f"servers: {self.servers}" if self.servers else ""
        parts = (self.slow, servers, figures_text(self.figures or {}))
        return self.message or self.reason or "; ".join(part for part in parts if part)

    @property
    def times(self) -> tuple[str, str, str]:
        """The time of its attempts together, the remaining time, and the age of its last report, in words."""
        took = duration(self.seconds) if self.seconds is not None else self.elapsed or ""
        if self.state != "running":
            return took, "", ""
        left = duration(self.eta) if self.eta is not None else ""
        age = f"{duration(max(0.0, time.time() - self.last_report))} ago" if self.last_report is not None else ""
        return took, left, age

    def json(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v not in (None, "") and k != "events"}


def node_status(run: Run, store: Store, node: NodeRow) -> NodeStatus:
    """Reads artifact, lease and events; the artifact outranks the rest."""
    name, key = node["name"], node["key"]
    summary = EventSummary(run.node_folder(name))
    state, tail, eta = summary.state, summary.tail, summary.eta()
    progress, begun, last = state["progress"], state["start"], state["last"]
    present = holder(store.work(key))
    running = present is not None and present.alive
    end = last if last and last["event"] == "end" else None
    reported: dict[str, Any] = {}
    if progress:
        reported = {name: progress[name] for name in ("done", "total", "unit")}
        reported["figures"] = figures_of(progress) or None
    node_so_far = NodeStatus(
        name,
        key,
        "waiting",
        **reported,
        seconds=summary.seconds(time.time() if running else None),
        ranks=begun["ranks"] if begun else None,
        eta=eta,
        restarts=max(0, state["attempts"] - 1) or None,
        last_report=last["time"] if last else None,
        events=summary,
    )
    if not running and tail.cut:
        json_files.report(Damaged(tail.path, "its last line is cut"), "the other lines count")
    # The artifact outranks the lease, and the lease the events: an old process may still hold or write them.
    if store.sealed(key):
        if tail.path.is_file() and not (tail.cut or tail.offset):
            json_files.report(Damaged(tail.path, "it is empty"), "what the stage did is not known")
        try:
            store.manifest(key)
        except Damaged as error:
            json_files.report(error, "what needs this artifact cannot be run")
            return replace(node_so_far, state="damaged", message=str(error))
        return replace(node_so_far, state="sealed")
    if running:
        return replace(node_so_far, state="running", slow=state["slow"])
    if end is not None and end["outcome"] not in ("busy", "sealed"):
        return replace(node_so_far, state="failed", message=end["outcome"], kind=end.get("kind"))
    if last is not None and end is None:
        return replace(node_so_far, state="failed", message=CUT_OFF)
    return node_so_far


def status(run: Run, store: Store) -> list[NodeStatus]:
    stages = [node_status(run, store, node) for node in run.body["nodes"]]
    if refused := run.body.get("refused"):
        settled = ("sealed", "damaged", "running")
        return [s if s.state in settled else replace(s, state=REFUSED, message=refused, kind=Kind.USER) for s in stages]
    return stages
