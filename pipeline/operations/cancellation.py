"""Ends the running stages of a run, here or on Slurm. The next run of the recipe resumes them."""

from __future__ import annotations

import os
import signal
import socket
import time

from pipeline.core import users
from pipeline.core.errors import AtomError
from pipeline.core.lease import holder
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch import slurm_client, submission_lock
from pipeline.tracking.status import living_jobs

STOP_SECONDS = 30.0
"""The total time to wait for stages on this machine."""


def cancel_jobs(run: Run, store: Store) -> list[str]:
    """Cancels the run's jobs in Slurm, but not those that other runs submitted. Returns the names of the stages. Raises
    AtomError if Slurm hides the jobs from this user, or refuses."""
    with submission_lock.submitting(store):
        jobs = _living_jobs(run)
        rows = [row for name, row in run.jobs().items() if name in jobs]
        arrays = [array for row in rows for array in (row.get("array"), *row.get("servers", ())) if array]
        if not jobs and run.owner != users.present() and slurm_client.hides_jobs():
            raise AtomError(f"Slurm shows jobs of {run.owner} to no other user; let {run.owner} cancel run {run.id}")
        if jobs:
            slurm_client.run_command("scancel", *jobs.values(), *arrays)
    return list(jobs)


def _living_jobs(run: Run) -> dict[str, str]:
    """The jobs in Slurm that the run submitted, by stage."""
    rows = run.jobs()
    living = living_jobs(run, slurm_client.queued_jobs({run.owner}))
    return {name: rows[name]["job"] for name in living if not rows[name]["attached"]}


def attached_runs(run: Run, store: Store) -> list[Run]:
    """The other runs that wait for jobs of this one."""
    jobs = set(_living_jobs(run).values()) if run.jobs() else set()
    if not jobs:
        return []
    return [
        other
        for other in runs.runs(store)
        if other.id != run.id and any(row["attached"] and row["job"] in jobs for row in other.jobs().values())
    ]


def stop_processes(run: Run, store: Store) -> list[str]:
    """Signals the run's stages on this machine to stop, and waits for their end. Returns their names.

    Raises AtomError if one runs on another host.
    """
    running = [stage for stage in runs.status(run, store) if stage.state == "running"]
    for stage in running:
        _terminate(store, stage)
    for stage in running:
        deadline = time.monotonic() + STOP_SECONDS
        while (present := holder(store.work(stage.key))) and present.alive and time.monotonic() < deadline:
            time.sleep(0.2)
    return [stage.name for stage in running]


def _terminate(store: Store, stage: NodeStatus) -> None:
    present = holder(store.work(stage.key))
    if present is None or not present.alive:
        return
    if present.host != socket.gethostname():
        raise AtomError(f"stage {stage.name} runs on {present.host}; run `atom cancel` there")
    try:
        os.kill(present.pid, signal.SIGTERM)
    except PermissionError:
        raise AtomError(f"stage {stage.name} is a process of another user, who alone can stop it") from None
