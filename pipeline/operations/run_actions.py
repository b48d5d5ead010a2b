"""Lists the runs of a home, finds the logs of their stages, and stops them here or on Slurm."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import ORDERLY, AtomError
from pipeline.core.lease import holder
from pipeline.core.provenance import clock
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import REFUSED, NodeStatus, Run
from pipeline.launch import slurm_client, submission_lock
from pipeline.launch.slurm_client import NoAnswer
from pipeline.tracking.status import living_jobs

# Seconds since the epoch that are still a time of an event: those of the year 5138.
LATEST = 1e11


@dataclass(frozen=True)
class RunRow:
    """One run of a list."""

    id: str
    # The user who began it.
    owner: str
    recipe: str
    version: str
    # `sealed` if all of its stages are; `running`; `queued` in Slurm; `refused` by Slurm; `failed`; `stopped`; or
    # `unfinished` if its process is gone.
    state: str
    stages: int
    # The number of sealed stages.
    sealed: int
    # Seconds since the epoch.
    began: float
    # Seconds since the epoch.
    last_event: float
    # The stage of the last event, or of the last failure.
    stage: str | None = None
    # The message of the last failure.
    message: str | None = None

    @property
    def hours(self) -> float:
        """The hours from its start to its last event."""
        return (self.last_event - self.began) / 3600

    def json(self) -> dict[str, Any]:
        times = {name: clock(getattr(self, name)) for name in ("began", "last_event")}
        return {**asdict(self), **times, "hours": round(self.hours, 4)}


def list_rows(listed: list[Run], store: Store) -> tuple[list[RunRow], str | None]:
    """Returns a row for each of these runs, and one sentence on missing information. Slurm is asked once for all."""
    drafts = [_row(run, store) for run in listed]
    over = ("sealed", "running", REFUSED)
    unfinished = [run for run, row in zip(listed, drafts, strict=True) if row.state not in over and run.jobs()]
    if not unfinished:
        return drafts, None
    try:
        queue = slurm_client.queued_jobs({user for run in unfinished for user in run.users()})
    except NoAnswer as error:
        return drafts, f"{error}; the states are those that the stages recorded"
    states: dict[str, str] = {}
    for run in unfinished:
        if jobs := living_jobs(run, queue):
            is_running = any(job.state == "RUNNING" for job in jobs.values())
            states[run.id] = "running" if is_running else "queued"
    return [replace(row, state=states.get(row.id, row.state)) for row in drafts], None


def _row(run: Run, store: Store) -> RunRow:
    """Returns the row of a run by its files alone."""
    nodes, began = runs.status(run, store), _began(run)
    failed = [node for node in nodes if node.kind is not None or node.state == "damaged"]
    sealed = sum(node.state == "sealed" for node in nodes)
    state, message = "unfinished", None
    latest = max(nodes, key=_last_report)
    final = min(LATEST, max(began, _last_report(latest)))
    if sealed == len(nodes):
        state = "sealed"
    elif any(node.state == "running" for node in nodes):
        state = "running"
    elif failed:
        latest = max(failed, key=_last_report)
        message = latest.message
        state = REFUSED if latest.state == REFUSED else "stopped" if latest.kind in ORDERLY else "failed"
    stage = None if latest.last_report is None else latest.name
    release = run.body["recipe"], run.body["version"]
    return RunRow(run.id, run.owner, *release, state, len(nodes), sealed, began, final, stage, message)


def _last_report(node: NodeStatus) -> float:
    return node.last_report or 0.0


def _began(run: Run) -> float:
    """Returns the time in a run's id, which copies of a home keep; else the time of its run.json."""
    if match := re.search(r"-([0-9]{8}-[0-9]{6})-[0-9a-f]+$", run.id):
        with suppress(ValueError):
            return datetime.strptime(match[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()
    return (run.folder / "run.json").stat().st_mtime


# The suffix of the name of rank 0's log, after the id of the job.
FIRST = "_0_log.out"


def find_log(store: Store, candidates: Sequence[Run], stage: str, rank: int) -> tuple[Run, Path]:
    """Returns (the first of the runs that has a log of the stage, the file). Raises AtomError if there is none."""
    for run in candidates:
        if logs := _logs(run, stage):
            return run, _log_of_rank(run, stage, logs[-1], rank)
    names = sorted({node["name"] for run in candidates for node in run.body["nodes"]})
    hint = f"; stages: {', '.join(names)}" if names and stage not in names else ""
    raise AtomError(f"there is no log of stage {stage} under {store.logs}{hint or '; it never ran there'}")


def _logs(run: Run, stage: str) -> list[Path]:
    """Returns rank 0's logs of a stage, the latest last."""
    return sorted((run.folder / stage / "submitit").glob(f"*{FIRST}"), key=lambda path: path.stat().st_mtime)


def _log_of_rank(run: Run, stage: str, first: Path, rank: int) -> Path:
    path = first.with_name(first.name.replace(FIRST, f"_{rank}_log.out"))
    if not path.exists():
        number = len(list(path.parent.glob(first.name.replace(FIRST, "_*_log.out"))))
        ranks = "one rank, 0" if number == 1 else f"ranks 0 to {number - 1}"
        raise AtomError(f"stage {stage} has no rank {rank} in run {run.id}; its latest attempt ran as {ranks}")
    return path


# The total time to wait for stages on this machine.
STOP_SECONDS = 30.0


def cancel_jobs(run: Run, store: Store) -> list[str]:
    """Cancels the run's jobs in Slurm, but not those that other runs submitted.

    Returns the names of the stages. Raises AtomError if Slurm refuses.
    """
    # Under the lock, so that no submitter attaches to a job that is about to be cancelled.
    with submission_lock.submitting(store):
        jobs = _living_jobs(run)
        rows = [row for name, row in run.jobs().items() if name in jobs]
        arrays = [array for row in rows for array in (row.get("array"), *row.get("servers", ())) if array]
        if jobs:
            slurm_client.run_command("scancel", *jobs.values(), *arrays)
    return list(jobs)


def _living_jobs(run: Run) -> dict[str, str]:
    """Returns the jobs in Slurm that the run submitted, by stage."""
    rows = run.jobs()
    living = living_jobs(run, slurm_client.queued_jobs({run.owner}))
    return {name: rows[name]["job"] for name in living if not rows[name]["attached"]}


def attached_runs(run: Run, store: Store) -> list[Run]:
    """Returns the other runs that wait for jobs of this one."""
    jobs = set(_living_jobs(run).values()) if run.jobs() else set()
    if not jobs:
        return []
    return [
        other_run
        for other_run in runs.runs(store)
        if other_run.id != run.id and any(row["attached"] and row["job"] in jobs for row in other_run.jobs().values())
    ]


def stop_processes(run: Run, store: Store) -> list[str]:
    """Signals the run's stages on this machine to stop, and waits for their end. Returns their names.

    Raises AtomError if one runs on another host.
    """
    running = [stage for stage in runs.status(run, store) if stage.state == "running"]
    # All are signaled first, so that they save at the same time.
    for stage in running:
        _terminate(store, stage)
    for stage in running:
        deadline = time.monotonic() + STOP_SECONDS
        while (lease_holder := holder(store.work(stage.key))) and lease_holder.alive and time.monotonic() < deadline:
            time.sleep(0.2)
    return [stage.name for stage in running]


def _terminate(store: Store, stage: NodeStatus) -> None:
    lease_holder = holder(store.work(stage.key))
    if lease_holder is None or not lease_holder.alive:
        return
    if lease_holder.host != socket.gethostname():
        raise AtomError(f"stage {stage.name} runs on {lease_holder.host}; run `atom cancel` there")
    try:
        os.kill(lease_holder.pid, signal.SIGTERM)
    except PermissionError:
        raise AtomError(f"stage {stage.name} is a process of another user, who alone can stop it") from None
