"""How a run stands: what its files say, and for a run that Slurm has, what Slurm says. Nothing is kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files
from pipeline.core.events import Tail
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch import job, slurm_client, submission_lock
from pipeline.launch.slurm_client import Job, NoAnswer

BROKEN = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
"""How a task of an array may end, so that what waits for the array is cancelled."""
ENDING = "ending"
"""The state of a stage whose attempt has failed while Slurm still has its job: it says why, not that it runs."""
ENDED = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "its time limit came before it could save; raise minutes or signal_before_limit_seconds of the profile",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it ran out of memory",
}


def status(run: Run, store: Store) -> tuple[list[NodeStatus], str | None]:
    """The stages of a run, and what could not be learnt of them, in one sentence."""
    found, jobs = runs.status(run, store), run.jobs()
    if not jobs:
        return found, None
    try:
        held = slurm_client.held()
    except NoAnswer as error:
        return found, f"{error}; what stands here is what the stages wrote themselves"
    rest = [row["job"] for name, row in jobs.items() if not _ours(held.get(row["job"]), run, row, name, store)]
    ended: dict[str, Job] = {}
    lack = None
    try:
        # accounting never hears of the end of a job that the controller lost, and goes on to call it pending or running
        ended = {id: found for id, found in slurm_client.ended(rest).items() if not found.alive}
    except NoAnswer as error:
        lack = f"{error}; how jobs ended that Slurm has forgotten is not known"
    out = []
    for node in found:
        row = jobs.get(node.name)
        if row is None:
            out.append(node)
            continue
        of_node = held.get(row["job"])
        if not _ours(of_node, run, row, node.name, store):
            of_node = ended.get(row["job"])
        known = _with_job(node, row["job"], of_node, restarts(run, node.name))
        out.append(_with_array(known, row, run, held) if row.get("array") else known)
    return out, lack


def _ours(job: Job | None, run: Run, row: dict[str, object], node: str, store: Store) -> bool:
    """Whether a job that Slurm holds is the one that was submitted, not another that was given its id."""
    if job is None:
        return False
    told = job.comment.split(" ")
    return len(told) == 4 and told[2] == node and (bool(row["attached"]) or told[1] == run.id)


def _with_job(node: NodeStatus, id: str, job: Job | None, again: int) -> NodeStatus:
    """A node as its files tell it, with what Slurm says of its job; an artifact outranks both."""
    node = replace(node, job=id, restarts=again or None)
    if job is None:
        if node.state in ("sealed", "running", "failed"):
            return node
        return replace(node, state="lost", message="Slurm knows its job no more; `atom retry` submits it again")
    node = replace(node, nodes=job.nodes or None, elapsed=job.elapsed or None)
    if node.state == "sealed":
        return node
    if job.alive:
        reason = f"{job.reason}; `atom retry` releases it" if job.stuck else job.reason
        if node.state == "failed" and node.kind is not None and job.state in ("RUNNING", "COMPLETING"):
            return replace(node, state=ENDING, reason=reason or None)  # its attempt is over, and the job nearly is
        return replace(node, state=job.state.lower(), reason=reason or None, message="", kind=None)
    message = node.message or ENDED.get(job.state, f"{job.state.lower().replace('_', ' ')} {job.reason}".strip())
    if job.state == "CANCELLED":
        return replace(node, state="cancelled", reason=job.reason or None, message="", kind=None)
    return replace(node, state="failed", message=message)


def _with_array(node: NodeStatus, row: Mapping[str, Any], run: Run, held: dict[str, Job]) -> NodeStatus:
    """A node whose shards are done beforehand by a job array: how far that is, or which task failed."""
    if node.state in ("sealed", "running"):
        return node
    folder = run.node_folder(node.name) / "shards"
    said = [_decision(path).split("\n") for path in folder.glob("ranks/*/decision")]
    failed = [lines[2 if lines[2:] and lines[2] else 1] for lines in said if lines[0] == job.FAILED]  # older: no kind
    tasks = (each for id, each in held.items() if id.startswith(f"{row['array']}_"))
    bad = [each.id for each in tasks if each.state in BROKEN]
    if node.state == "cancelled" and (failed or bad):
        why = failed[0] if failed else f"task {bad[0]} of its array failed; its log is in {folder / 'submitit'}"
        return replace(node, state="failed", reason=None, message=why)
    done: dict[str, int] = {}
    for path in folder.glob("ranks/*/shards.json"):  # a task that was started again counts what it finds done, too
        task = path.parent.name.rpartition(".")[0]
        done[task] = max(done.get(task, 0), _shards_done(path))
    return replace(node, done=sum(done.values()), total=row.get("shards", 0), unit="shards")


class _Shards(TypedDict):
    done: int


_SHARDS: TypeAdapter[Any] = TypeAdapter(_Shards)


def _shards_done(path: Path) -> int:
    try:
        return int(json_files.read(path, _SHARDS)["done"])
    except FileNotFoundError:
        return 0
    except Damaged as error:
        json_files.report(error, "its shards are not counted")
        return 0


def _decision(path: Path) -> str:
    try:
        return json_files.read_text(path)
    except FileNotFoundError:
        return ""
    except Damaged as error:
        json_files.report(error, "how that task ended is not known")
        return ""


def restarts(run: Run, node: str) -> int:
    """How often a stage's job was started again."""
    events = Tail(run.node_folder(node) / "events.jsonl").read()
    return max(0, len([event for event in events if event["event"] == "attempt"]) - 1)


def over(stages: list[NodeStatus]) -> bool:
    """Whether nothing of a run goes on by itself."""
    still = {"running", ENDING, *(state.lower() for state in slurm_client.LIVING)}
    return not any(stage.state in still for stage in stages)


def cancel(run: Run, store: Store) -> list[str]:
    """Cancels the run's jobs that Slurm holds, but not those that other runs submitted. Returns the stages' names."""
    with submission_lock.submitting(store):
        held = slurm_client.held()
        own = {
            name: row["job"]
            for name, row in run.jobs().items()
            if not row["attached"] and _ours(held.get(row["job"]), run, row, name, store) and held[row["job"]].alive
        }
        arrays = [row["array"] for name, row in run.jobs().items() if name in own and row.get("array")]
        if own:
            slurm_client.ask("scancel", *own.values(), *arrays)
    return list(own)
