"""Lists the runs of a home, at the cost of a few small reads a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core import json_files
from pipeline.core.errors import Kind
from pipeline.core.json_files import Damaged
from pipeline.core.lease import holder
from pipeline.core.store import Store
from pipeline.graph.run import REFUSED, Run
from pipeline.launch import slurm_client
from pipeline.launch.slurm_client import NoAnswer
from pipeline.tracking.status import is_submitted_job

END_BYTES = 2**16
"""Of a log of events, in which its last event stands."""
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


def rows(runs: list[Run], store: Store) -> tuple[list[RunRow], str | None]:
    """A row for each of these runs, and one sentence on missing information.

    Each folder of the home is listed once. Of a run, the times of its logs and the end of the latest are read.
    """
    sealed, working = _names(store.artifacts), _names(store.home / "work")
    drafts = [_row(run, store, sealed, working) for run in runs]
    over = ("sealed", "running", REFUSED)
    unfinished = [run for run, row in zip(runs, drafts, strict=True) if row.state not in over]
    jobs = {run.id: run.jobs() for run in unfinished if (run.folder / "jobs.jsonl").exists()}
    if not jobs:
        return drafts, None
    try:
        queue = slurm_client.queued_jobs({user for run in unfinished for user in run.users()})
    except NoAnswer as error:
        return drafts, f"{error}; the states are those that the stages recorded"
    states: dict[str, str] = {}
    for run in unfinished:
        for name, job in jobs.get(run.id, {}).items():
            slurm_job = queue.get(job["job"])
            if is_submitted_job(slurm_job, run, job, name) and slurm_job is not None and slurm_job.alive:
                is_running = slurm_job.state == "RUNNING" or states.get(run.id) == "running"
                states[run.id] = "running" if is_running else "queued"
    return [RunRow(**{**asdict(row), "state": states.get(row.id, row.state)}) for row in drafts], None


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(json_files.names(folder))
    except Damaged as error:
        json_files.report(error, "what is in it is not known")
        return frozenset()


def _row(run: Run, store: Store, sealed: frozenset[str], working: frozenset[str]) -> RunRow:
    nodes = {node["name"]: node["key"] for node in run.body["nodes"]}
    done = sum(key in sealed for key in nodes.values())
    began = _began(run)
    times: dict[str, float] = {}
    for name in nodes:
        with suppress(OSError):  # a stage that has not begun
            times[name] = os.stat(run.node_folder(name) / "events.jsonl").st_mtime
    last = max(times, key=lambda name: times[name], default=None)
    state, message = "unfinished", None
    if done == len(nodes):
        state = "sealed"
    elif any(_is_held(store, key) for name, key in nodes.items() if key in working and name in times):
        state = "running"
    else:
        for name in sorted(times, key=lambda name: times[name], reverse=True):
            end = {} if nodes[name] in sealed else _last_event(run.node_folder(name) / "events.jsonl")
            if end.get("event") == "end" and end.get("outcome") not in ("sealed", "busy"):
                state = "stopped" if end.get("kind") == Kind.STOPPED else "failed"
                last, message = name, str(end.get("outcome"))
                break
        if refused := run.body.get("refused"):
            state, message = REFUSED, refused
    final = began if last is None else _last_event(run.node_folder(last) / "events.jsonl").get("time", times[last])
    return RunRow(
        run.id, run.owner, run.body["recipe"], run.body["version"], state, len(nodes), done, began, max(began, final),
        last, message,
    )  # fmt: skip


def _began(run: Run) -> float:
    """The time in a run's id, which copies of a home keep; else the time of its run.json."""
    if match := re.search(r"-([0-9]{8}-[0-9]{6})-[0-9a-f]+$", run.id):
        with suppress(ValueError):
            return datetime.strptime(match[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()
    return (run.folder / "run.json").stat().st_mtime


def _is_held(store: Store, key: str) -> bool:
    present = holder(store.work(key))
    return present is not None and present.alive


def _last_event(path: Path) -> Mapping[str, Any]:
    """The last complete line of a log of events; empty if it cannot be read."""
    try:
        with json_files.open_file(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
            lines = file.read(END_BYTES).split(b"\n")
    except FileNotFoundError:
        return {}
    except Damaged as error:
        json_files.report(error, "what it says is not known")
        return {}
    for line in reversed(lines):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and 0 <= event["time"] < LATEST:
                return event
    return {}
