"""The status of a run, from its files and, for a run on Slurm, from Slurm. Nothing is kept in memory."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.core import json_files
from pipeline.core.errors import ORDERLY, Kind
from pipeline.core.json_files import Damaged
from pipeline.core.log_summary import Curves, EventSummary
from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph import run as runs
from pipeline.graph.budget import Hours, Resource
from pipeline.graph.run import CUT_OFF, REFUSED, JobRow, NodeStatus, Run, RunFolder
from pipeline.launch import diagnoses, slurm_client
from pipeline.launch.diagnoses import FAILURES
from pipeline.launch.rendezvous import Decision, Verdict, launch_number
from pipeline.launch.slurm_client import Answers, Job, NoAnswer

# The final states of an array task that cancel the jobs that depend on the array.
FAILED_STATES = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
# The state of a stage that has failed for good while Slurm still has its job: the cause is shown instead of `running`.
ENDING = "ending"
# The state of a stage whose attempt has ended while Slurm still has its job, which starts the stage again.
RESTARTING = "restarting"


def status(run: Run, store: Store, answers: Answers | None = None) -> tuple[list[NodeStatus], str | None]:
    """Returns the stages of a run, and one sentence on missing information; None instead of it if nothing is missing.

    `answers` are the answers of Slurm, which a loop keeps.
    """
    answers = answers or Answers()
    stages, jobs = runs.status(run, store), run.jobs()
    if not jobs:
        return stages, None
    try:
        slurm_jobs = answers.ask(slurm_client.queued_jobs, tuple(sorted(run.users())))
    except NoAnswer as error:
        return stages, f"{error}; the states are those that the stages recorded"
    queued = {name: slurm_jobs.get(row["job"]) for name, row in jobs.items()}
    queued = {name: job for name, job in queued.items() if is_submitted_job(job, run, jobs[name], name)}
    # the queue has neither the exit code of a failed job nor who cancelled one
    in_queue = {name for name, job in queued.items() if job is not None and job.state not in ("FAILED", "CANCELLED")}
    missing_jobs = {row["job"] for name, row in jobs.items() if name not in in_queue}
    finished_jobs: dict[str, Job] = {}
    problem, owner = None, run.owner
    try:
        # accounting never learns the end of a job that the controller lost, and keeps it as pending or running
        ended = answers.ask(slurm_client.finished_jobs, tuple(sorted(missing_jobs)))
        finished_jobs = {id: job for id, job in ended.items() if not job.alive}
    except NoAnswer as error:
        problem = FAILURES["no_accounting"].text(detail=str(error))
    rows = []
    for node in stages:
        row = jobs.get(node.name)
        if row is None or node.state == REFUSED:
            rows.append(node)
            continue
        slurm_job = _merge(queued.get(node.name), finished_jobs.get(row["job"]), run, row, node.name)
        submitter = _submitter(run, row, slurm_job, store)
        launch = _last_launch(submitter, node.name, row["job"])
        with_job = _add_job_state(node, row["job"], slurm_job, launch)
        if slurm_job is not None and slurm_job.user not in ("", owner):
            with_job = replace(with_job, user=slurm_job.user)
        with_job = replace(with_job, servers=_servers(row, slurm_jobs))
        rows.append(_add_array_state(with_job, row, run, slurm_jobs) if row.get("array") else with_job)
    return rows, problem


def _merge(queued: Job | None, finished: Job | None, run: Run, row: JobRow, name: str) -> Job | None:
    """Returns a job by the queue and by the accounting, which may have no script of it."""
    if finished is not None and finished.owner is not None and not is_submitted_job(finished, run, row, name):
        finished = None
    if queued is None or finished is None:
        return queued or finished
    return replace(queued, code=finished.code, cancelled_by=finished.cancelled_by)


def _submitter(run: Run, row: JobRow, job: Job | None, store: Store) -> RunFolder:
    """Returns the run that submitted a job: another one if this run only waits for the job."""
    owner = job.owner if job is not None and row["attached"] else None
    if owner is None or not re.match(runs.NAME, owner.run):
        return run
    return RunFolder(owner.run, store.logs / owner.run)


def _last_launch(run: RunFolder, node: str, job: str) -> Path | None:
    """Returns the folder of the last launch of a job; None before the first one."""
    launches = (run.node_folder(node) / "ranks").glob(f"{job}.*")
    return max(launches, key=launch_number, default=None)


def is_submitted_job(job: Job | None, run: Run, row: JobRow, node: str) -> bool:
    """Returns True if a job in Slurm is the submitted one, not another job with the same id."""
    owner = None if job is None else job.owner
    return owner is not None and owner.node == node and not owner.part and (row["attached"] or owner.run == run.id)


def living_jobs(run: Run, slurm_jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Returns the jobs in Slurm that have not ended, by the stage of the run that waits for them."""
    living = {}
    for name, row in run.jobs().items():
        job = slurm_jobs.get(row["job"])
        if job is not None and job.alive and is_submitted_job(job, run, row, name):
            living[name] = job
    return living


def _add_job_state(node: NodeStatus, id: str, job: Job | None, launch: Path | None) -> NodeStatus:
    """Returns the status of a node from its files and from Slurm's state of its job; an artifact outranks both.

    Args:
        node: The status by the files of the stage.
        id: The id of the job.
        job: The job as Slurm describes it; None if Slurm does not know it.
        launch: The folder of the last launch.
    """
    node = replace(node, job=id)
    if launch is not None:
        begins, relaunches = launch_number(launch)
        node = replace(node, restarts=max(node.restarts or 0, begins + relaunches) or None)
    if job is None:
        if node.state in ("sealed", "running", "failed"):
            return node
        return replace(node, state="lost", message=FAILURES["lost_job"].text(job=id))
    node = replace(node, nodes=job.nodes or None, elapsed=job.elapsed or None)
    if node.state == "sealed":
        return node
    verdict = None if launch is None else Verdict.read(launch)
    if not job.alive:
        node = replace(node, state="failed", message=end_message(job, node.message, verdict, node.kind))
        if job.state != "CANCELLED":
            return node
        by_another = job.cancelled_by not in ("", job.user)
        return replace(node, state="cancelled", kind=None, alert="cancelled" if by_another else None)
    if job.state in ("RUNNING", "COMPLETING") and _has_ended(node, launch):
        is_final = verdict.decision is Decision.FAILED if verdict else node.kind is not None and Kind(node.kind).final
        return replace(node, state=ENDING if is_final else RESTARTING)
    node = replace(node, state=job.state.lower(), reason=job.reason or None, message="", kind=None)
    if waiting := diagnoses.explain(job):
        row, sentence = waiting
        node = replace(node, reason=sentence, alert=row.name if row.alert else None)
    return node


def _has_ended(node: NodeStatus, launch: Path | None) -> bool:
    """Returns True if the present attempt has recorded its end.

    A launch may have begun since, and not have logged yet.
    """
    if node.state != "failed" or node.kind is None or node.events is None:
        return False
    return launch is None or launch.name == node.events.state["launch"]


def end_message(job: Job, recorded: str, verdict: Verdict | None, kind: str | None = None) -> str:
    """Returns the sentence about an ended job.

    It is the outcome that the stage or the script of the job recorded, or else follows from Slurm's final state.

    Args:
        job: The job.
        recorded: The outcome that the stage recorded; empty, or CUT_OFF, if it recorded none.
        verdict: The decision of the last launch; None without one.
        kind: The kind of the recorded failure.
    """
    row = diagnoses.of_job(job.state, job.code)
    if row is FAILURES["cancelled"]:
        is_cascade = job.reason == "DependencyNeverSatisfied"
        return FAILURES["never_started"].text() if is_cascade else row.text(user=job.cancelled_by or "somebody")
    if kind in ORDERLY:  # and then its job did not go on
        return f"{recorded} (Slurm ended its job: {_plain_end(job)})"
    if recorded not in ("", CUT_OFF):
        return recorded
    if verdict is not None and verdict.decision is Decision.FAILED:
        return verdict.text
    if row is None:
        return (verdict.text if verdict else "") or recorded or _plain_end(job)
    return row.text(nodes=job.nodes or "its nodes")


def _plain_end(job: Job) -> str:
    """Returns the final state of a job in Slurm's words."""
    code = f"exit code {job.code.partition(':')[0]}" if job.code else job.reason
    return f"{job.state.lower()} {code}".strip()


def _servers(row: JobRow, slurm_jobs: dict[str, Job]) -> str | None:
    """Returns the number of servers of a stage by state, in words; None if Slurm has none of them."""
    states = Counter(
        task_job.state
        for id, task_job in slurm_jobs.items()
        if id.rpartition("_")[0] in row.get("servers", ())
        for _ in range(_tasks(id))
    )
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items())) or None


def _tasks(id: str) -> int:
    """Returns the number of tasks that a line of squeue stands for: `7_2`, or `7_[0-3,5]` for those that wait.

    A long list is cut, `7_[0-3,5,...]`.
    """
    ranges = re.findall(r"([0-9]+)(?:-([0-9]+))?", id.rpartition("_")[2].partition("%")[0])
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


def _add_array_state(node: NodeStatus, row: JobRow, run: Run, slurm_jobs: dict[str, Job]) -> NodeStatus:
    """Returns the status of a node whose shards run in a job array: the progress of the array, or its failed task."""
    if node.state in ("sealed", "running"):
        return node
    folder = run.node_folder(node.name) / "shards"
    failed, done_by_task = [], dict[str, int]()
    for name in json_files.names(folder / "ranks"):
        if "." not in name:  # a mark that the job's script left beside the launches
            continue
        launch, task = folder / "ranks" / name, name.rpartition(".")[0]
        verdict = Verdict.read(launch)
        if verdict is not None and (match := re.fullmatch(r"([0-9]{1,9}) shards are done", verdict.text)):
            done = int(match[1])
        else:
            done = _shards_done(launch / "shards.json")
            failed += [verdict.text] if verdict and verdict.decision is Decision.FAILED else []
        done_by_task[task] = max(done_by_task.get(task, 0), done)  # a restarted task also counts finished shards
    tasks = (task_job for id, task_job in slurm_jobs.items() if id.startswith(f"{row['array']}_"))
    failed_tasks = [task_job.id for task_job in tasks if task_job.state in FAILED_STATES]
    if node.state == "cancelled" and (failed or failed_tasks):
        message = (
            failed[0] if failed else f"task {failed_tasks[0]} of its array failed; its log is in {folder / 'submitit'}"
        )
        return replace(node, state="failed", reason=None, message=message)
    return replace(node, done=sum(done_by_task.values()), total=row.get("shards", 0), unit="shards")


_SHARDS: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, int])


def _shards_done(path: Path) -> int:
    shards = json_files.read_optional(path, _SHARDS, "its shards are not counted")
    return int(shards.get("done", 0)) if shards else 0


def kept_nodes(run: Run) -> list[str]:
    """Returns the sentences of jobs' scripts about bad nodes that their next start does not avoid."""
    sentences = []
    for name in run.jobs():
        for place in (".", "shards", "servers"):
            for path in sorted((run.node_folder(name) / place / "ranks").glob("*-kept")):
                with suppress(FileNotFoundError, Damaged):
                    sentences += [f"{name}: {line}" for line in json_files.read_text(path).splitlines()]
    return sentences


def over(stages: list[NodeStatus]) -> bool:
    """Returns True if no stage of a run continues by itself."""
    active_states = {"running", ENDING, RESTARTING, *(state.lower() for state in slurm_client.LIVING)}
    return not any(stage.state in active_states for stage in stages)


# The curves that are counted or summed, and not drawn.
NO_CHARTS = ("tokens", "spike")


@dataclass(frozen=True)
class StageView:
    """A stage with its logs."""

    status: NodeStatus
    # None if it has recorded none.
    curves: Curves | None

    @property
    def events(self) -> EventSummary:
        """The summary of its events, as it was when its status was read."""
        assert self.status.events is not None, "the status of a node of a run has them"
        return self.status.events

    @property
    def gpus(self) -> int:
        start = self.events.state["start"]
        return start.get("gpus", 0) if start else 0

    def names(self) -> list[str]:
        """Returns the names of its curves, as its stage reports them."""
        names = [] if self.curves is None else list(self.curves.state["curves"])
        return [name for name in names if name not in NO_CHARTS]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: Run
    time: float
    stages: tuple[StageView, ...]
    # A sentence on missing information.
    lack: str | None
    # Hours of ended attempts and of the present ones, where a rank without GPUs counts as one busy core.
    used: Hours

    @property
    def over(self) -> bool:
        return over([stage.status for stage in self.stages])


def take(run: Run, store: Store, answers: Answers | None = None) -> Snapshot:
    """Reads the files of a run, and asks Slurm for its jobs if it has any. Writes nothing.

    `answers` are the answers of Slurm, which a loop keeps.
    """
    nodes, lack = status(run, store, answers)
    stages = []
    for node in nodes:
        folder = run.node_folder(node.name)
        curves = Curves(folder) if (folder / "metrics.jsonl").exists() else None
        stages.append(StageView(node, curves))
    now = time.time()
    return Snapshot(run, now, tuple(stages), lack, _used(store, stages, now))


def _used(store: Store, stages: Iterable[StageView], now: float) -> Hours:
    stages = list(stages)
    used = budget.used(store, (stage.status.key for stage in stages))
    for stage in stages:
        start = stage.events.state["start"]
        if stage.status.state == "running" and start:
            name: Resource = "gpu_hours" if stage.gpus else "core_hours"
            used[name] += max(0.0, now - start["time"]) * (stage.gpus or start["ranks"]) / 3600
    return used


def sparkline(values: list[float], width: int) -> str:
    """Returns the last values as one line of blocks."""
    values = values[-width:]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((value - low) / (high - low or 1) * 8))] for value in values)
