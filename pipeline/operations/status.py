"""How a run stands: what its files say, and for a run that Slurm has, what Slurm says. Nothing is kept in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files
from pipeline.core.events import EventTail
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import JobRow, NodeStatus, Run
from pipeline.launch import slurm_client
from pipeline.launch.decision import Decision, Verdict
from pipeline.launch.slurm_client import Job, NoAnswer

FAILED_STATES = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
"""How a task of an array may end, so that what waits for the array is canceled."""
ENDING = "ending"
"""The state of a stage whose attempt has failed while Slurm still has its job: it says why, not that it runs."""
END_MESSAGES = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "its time limit came before it saved; raise minutes or signal_before_limit_seconds of the profile",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it ran out of memory",
}


def status(run: Run, store: Store) -> tuple[list[NodeStatus], str | None]:
    """The stages of a run, and what could not be learnt of them, in one sentence."""
    stages, jobs = runs.status(run, store), run.jobs()
    if not jobs:
        return stages, None
    try:
        slurm_jobs = slurm_client.queued_jobs()
    except NoAnswer as error:
        return stages, f"{error}; the states are those that the stages recorded"
    unmatched = [
        row["job"] for name, row in jobs.items() if not is_submitted_job(slurm_jobs.get(row["job"]), run, row, name)
    ]
    finished_jobs: dict[str, Job] = {}
    problem = None
    try:
        # accounting never hears of the end of a job that the controller lost, and goes on to call it pending or running
        finished_jobs = {
            id: ended_job for id, ended_job in slurm_client.finished_jobs(unmatched).items() if not ended_job.alive
        }
    except NoAnswer as error:
        problem = f"{error}; the outcome of jobs that Slurm has forgotten is unknown"
    rows = []
    for node in stages:
        row = jobs.get(node.name)
        if row is None:
            rows.append(node)
            continue
        slurm_job = slurm_jobs.get(row["job"])
        if not is_submitted_job(slurm_job, run, row, node.name):
            slurm_job = finished_jobs.get(row["job"])
        with_job = _add_job_state(node, row["job"], slurm_job, restarts(run, node.name))
        rows.append(_add_array_state(with_job, row, run, slurm_jobs) if row.get("array") else with_job)
    return rows, problem


def is_submitted_job(job: Job | None, run: Run, row: JobRow, node: str) -> bool:
    """Whether a job that Slurm holds is the one that was submitted, not another that was given its id."""
    owner = None if job is None else job.owner
    return owner is not None and owner.node == node and (row["attached"] or owner.run == run.id)


def _add_job_state(node: NodeStatus, id: str, job: Job | None, restart_count: int) -> NodeStatus:
    """A node as its files tell it, with what Slurm says of its job; an artifact outranks both."""
    node = replace(node, job=id, restarts=restart_count or None)
    if job is None:
        if node.state in ("sealed", "running", "failed"):
            return node
        return replace(node, state="lost", message="Slurm has no record of its job; `atom retry` submits it again")
    node = replace(node, nodes=job.nodes or None, elapsed=job.elapsed or None)
    if node.state == "sealed":
        return node
    if job.alive:
        reason = f"{job.reason}; `atom retry` releases it" if job.stuck else job.reason
        if node.state == "failed" and node.kind is not None and job.state in ("RUNNING", "COMPLETING"):
            return replace(node, state=ENDING, reason=reason or None)  # its attempt is over, and the job nearly is
        return replace(node, state=job.state.lower(), reason=reason or None, message="", kind=None)
    message = node.message or END_MESSAGES.get(job.state, f"{job.state.lower().replace('_', ' ')} {job.reason}".strip())
    if job.state == "CANCELLED":
        return replace(node, state="cancelled", reason=job.reason or None, message="", kind=None)
    return replace(node, state="failed", message=message)


def _add_array_state(node: NodeStatus, row: JobRow, run: Run, slurm_jobs: dict[str, Job]) -> NodeStatus:
    """A node whose shards are done beforehand by a job array: how far that is, or which task failed."""
    if node.state in ("sealed", "running"):
        return node
    folder = run.node_folder(node.name) / "shards"
    verdicts = [Verdict.read(path.parent) for path in folder.glob("ranks/*/decision")]
    failed = [verdict.text for verdict in verdicts if verdict and verdict.decision is Decision.FAILED]
    tasks = (task_job for id, task_job in slurm_jobs.items() if id.startswith(f"{row['array']}_"))
    failed_tasks = [task_job.id for task_job in tasks if task_job.state in FAILED_STATES]
    if node.state == "cancelled" and (failed or failed_tasks):
        message = (
            failed[0] if failed else f"task {failed_tasks[0]} of its array failed; its log is in {folder / 'submitit'}"
        )
        return replace(node, state="failed", reason=None, message=message)
    done_by_task: dict[str, int] = {}
    for path in folder.glob("ranks/*/shards.json"):  # a task that was started again counts what it finds done, too
        task = path.parent.name.rpartition(".")[0]
        done_by_task[task] = max(done_by_task.get(task, 0), _shards_done(path))
    return replace(node, done=sum(done_by_task.values()), total=row.get("shards", 0), unit="shards")


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


def restarts(run: Run, node: str) -> int:
    """How often a stage's job was started again."""
    events = EventTail(run.node_folder(node) / "events.jsonl").read()
    return max(0, len([event for event in events if event["event"] == "attempt"]) - 1)


def over(stages: list[NodeStatus]) -> bool:
    """Whether nothing of a run goes on by itself."""
    active_states = {"running", ENDING, *(state.lower() for state in slurm_client.LIVING)}
    return not any(stage.state in active_states for stage in stages)
