"""Lists the runs of a home."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.core.errors import Kind
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import REFUSED, NodeStatus, Run
from pipeline.launch import slurm_client
from pipeline.launch.slurm_client import NoAnswer
from pipeline.tracking.status import living_jobs

LATEST = 1e11
"""Seconds since the epoch that are still a time of an event: those of the year 5138."""


@dataclass(frozen=True)
class RunRow:
    """One run. state: `sealed` if all of its stages are; `running`; `queued` in Slurm; `refused` by Slurm; `failed`;
    `stopped`; or `unfinished` if its process is gone, or Slurm hides its jobs. owner: who began it. began, last_event:
    seconds since the epoch. message: of the last failure."""

    id: str
    owner: str
    recipe: str
    version: str
    state: str
    stages: int
    sealed: int
    began: float
    last_event: float
    stage: str | None = None
    message: str | None = None

    @property
    def hours(self) -> float:
        """From its start to its last event."""
        return (self.last_event - self.began) / 3600

    def json(self) -> dict[str, Any]:
        times = {name: _time(getattr(self, name)) for name in ("began", "last_event")}
        return {**asdict(self), **times, "hours": round(self.hours, 4)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rows(listed: list[Run], store: Store) -> tuple[list[RunRow], str | None]:
    """A row for each of these runs, and one sentence on missing information. Slurm is asked once for all."""
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
    """The row of a run by its files alone."""
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
        state = REFUSED if latest.state == REFUSED else "stopped" if latest.kind == Kind.STOPPED else "failed"
    stage = None if latest.last_report is None else latest.name
    return RunRow(
        run.id, run.owner, run.body["recipe"], run.body["version"], state, len(nodes), sealed, began, final, stage,
        message,
    )  # fmt: skip


def _last_report(node: NodeStatus) -> float:
    return node.last_report or 0.0


def _began(run: Run) -> float:
    """The time in a run's id, which copies of a home keep; else the time of its run.json."""
    if match := re.search(r"-([0-9]{8}-[0-9]{6})-[0-9a-f]+$", run.id):
        with suppress(ValueError):
            return datetime.strptime(match[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()
    return (run.folder / "run.json").stat().st_mtime
