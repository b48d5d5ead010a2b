"""The status of a run, from its files and, for a run on Slurm, from Slurm. Nothing is kept in memory."""

from __future__ import annotations

import re
from collections import Counter
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
"""The final states of an array task that cancel the jobs that depend on the array."""
ENDING = "ending"
"""The state of a stage whose attempt has failed while Slurm still has its job: the cause is shown instead of
`running`."""
END_MESSAGES = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "its time limit came before it saved; raise minutes or signal_before_limit_seconds of the profile",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it ran out of memory",
}


def status(run: Run, store: Store) -> tuple[list[NodeStatus], str | None]:
    """The stages of a run, and one sentence on missing information."""
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
        # accounting never learns the end of a job that the controller lost, and keeps it as pending or running
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
        with_job = _add_job_state(
            node, row["job"], slurm_job, restarts(run, node.name), _last_verdict(run, node.name, row["job"])
        )
        with_job = replace(with_job, servers=_servers(row, slurm_jobs))
        rows.append(_add_array_state(with_job, row, run, slurm_jobs) if row.get("array") else with_job)
    return rows, problem


def _last_verdict(run: Run, node: str, job: str) -> Verdict | None:
    """The decision about the last start of a job; None if it left none."""
    starts = (run.node_folder(node) / "ranks").glob(f"{job}.*")
    last = max(starts, key=lambda folder: int(folder.suffix[1:]), default=None)
    return None if last is None else Verdict.read(last)


def is_submitted_job(job: Job | None, run: Run, row: JobRow, node: str) -> bool:
    """Whether a job in Slurm is the submitted one, not another job with the same id."""
    owner = None if job is None else job.owner
    return owner is not None and owner.node == node and (row["attached"] or owner.run == run.id)


def _add_job_state(
    node: NodeStatus, id: str, job: Job | None, restart_count: int, verdict: Verdict | None
) -> NodeStatus:
    """The status of a node from its files and from Slurm's state of its job; an artifact outranks both. verdict: of
    the last start."""
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
            return replace(node, state=ENDING, reason=reason or None)  # its attempt has ended, and the job soon will
        return replace(node, state=job.state.lower(), reason=reason or None, message="", kind=None)
    message = (
        node.message
        or (verdict.text if verdict else "")
        or END_MESSAGES.get(job.state, f"{job.state.lower().replace('_', ' ')} {job.reason}".strip())
    )
    if job.state == "CANCELLED":
        return replace(node, state="cancelled", reason=job.reason or None, message="", kind=None)
    return replace(node, state="failed", message=message)


def _servers(row: JobRow, slurm_jobs: dict[str, Job]) -> str | None:
    """How many servers of a stage run, and how many wait or have ended; None if Slurm has none of them."""
    states = Counter(
        task_job.state
        for id, task_job in slurm_jobs.items()
        if row.get("servers") and id.startswith(f"{row['servers']}_")
        for _ in range(_tasks(id))
    )
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items())) or None


def _tasks(id: str) -> int:
    """The number of tasks that a line of squeue stands for: `7_2`, or `7_[0-3,5]` for those that wait. A long list is
    cut, `7_[0-3,5,...]`."""
    ranges = re.findall(r"([0-9]+)(?:-([0-9]+))?", id.rpartition("_")[2].partition("%")[0])
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


def _add_array_state(node: NodeStatus, row: JobRow, run: Run, slurm_jobs: dict[str, Job]) -> NodeStatus:
    """The status of a node whose shards run in a job array: the progress of the array, or its failed task."""
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
    for path in folder.glob("ranks/*/shards.json"):  # a restarted task also counts finished shards
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
    """The number of restarts of a stage's job."""
    events = EventTail(run.node_folder(node) / "events.jsonl").read()
    return max(0, len([event for event in events if event["event"] == "attempt"]) - 1)


def over(stages: list[NodeStatus]) -> bool:
    """Whether no stage of a run continues by itself."""
    active_states = {"running", ENDING, *(state.lower() for state in slurm_client.LIVING)}
    return not any(stage.state in active_states for stage in stages)
