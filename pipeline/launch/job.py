"""What a Slurm job runs: the worker, and around it what a cluster does to jobs.

What shall become of the job, rank 0 leaves in the file `decision` of the launch, for the job's script (slurm.py): the
Slurm commands are outside of a stage's container. An attempt that was told to stop, or failed, is started again while
attempts get further: what the stage reports as done is the measure, so a crash loop ends by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pipeline import budget, registry, tracking
from pipeline.events import FileReport, Tail
from pipeline.launch import preflight
from pipeline.launch.ranks import Usage, launch_folder, node_name, read, write
from pipeline.launch.sentences import tell
from pipeline.launch.worker import STOP, Task, work
from pipeline.store import Store

SEALED, DONE, AGAIN, FAILED = "sealed", "done", "again", "failed"
"""Decisions. done: sealed, and so is all that the run asked for."""


@dataclass(frozen=True)
class Terms:
    """nodes: all of the run, with their keys. budget: the recipe's. The rest is the profile's."""

    nodes: dict[str, str]
    budget: dict[str, float | None] | None
    restarts: int
    free_gb: float
    scratch: str | None


def run(spec: dict[str, Any], terms_: dict[str, Any]) -> str:
    """Runs one node as a Slurm job, on each of its ranks. Returns the decision, or how another rank than 0 ended."""
    task, terms = Task(**spec), Terms(**terms_)
    here, store = submitit.JobEnvironment(), Store(Path(task.home))
    folder = store.logs / task.run / task.node
    launch = launch_folder(folder, here.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    (launch / f"started-{here.global_rank}").touch()
    with told_to_stop() as told:
        lack = preflight.check(task, launch, here.global_rank, terms.free_gb, terms.scratch)
        if here.global_rank:
            return work(spec)
        report = FileReport(folder)
        report.event("attempt", job=here.raw_job_id, launch=launch.name, host=node_name(), pid=os.getpid())
        since, where = standstill(folder)
        lack = lack or (where if since > terms.restarts + 1 else None)
        final = budget.exceeded(terms.budget, store, terms.nodes.values())
        lack = lack or final
        if lack:
            report.end(lack)
        report.close()
        companion = None if lack else tracking.Companion(store.home, task.run)
        outcome = lack or work(spec)
        stopped = told()
    since, where = standstill(folder)
    if outcome == "sealed":
        decision = DONE if all(store.sealed(key) for key in terms.nodes.values()) else SEALED
    else:
        decision = AGAIN if not final and (stopped or since <= terms.restarts) else FAILED
    _decide(launch, decision, outcome)
    if companion is not None and decision == AGAIN:
        companion.leave()  # the time limit may be near; the next start sends on
    elif companion is not None:
        companion.close({DONE: "FINISHED", FAILED: "FAILED"}.get(decision, ""))
    return decision


def run_shards(spec: dict[str, Any], number: int, tasks: int, terms_: dict[str, Any]) -> str:
    """Does every shard of a node's work that falls to this task of a job array: `number`, and each `tasks` further on.

    Returns the decision: after an error the task is started again while it gets further, and else as often as the
    profile allows. Shards that were done stay done.
    """
    task, terms = Task(**spec), Terms(**terms_)
    here, store = submitit.JobEnvironment(), Store(Path(task.home))
    launch = launch_folder(store.logs / task.run / task.node / "shards", here.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    (launch / "started-0").touch()
    stage, before = registry.stage(task.stage), Usage.now()
    assert stage.run_shard is not None, "only such stages are submitted so"
    lack = preflight.own(Path(task.home), terms.free_gb, terms.scratch)
    if lack:
        return _decide(launch, AGAIN if restarted() < terms.restarts else FAILED, lack)
    mine: list[int] = []
    if not store.sealed(task.key):
        work = store.work(task.key) / "state"
        work.mkdir(parents=True, exist_ok=True)
        config = stage.config.model_validate(task.config)
        materials = {role: store.open(key) for role, key in task.inputs.items()}
        mine = list(range(number, stage.shards(config), tasks))
        before_this = max((found["done"] for found in _earlier(launch, here.raw_job_id)), default=0)
        try:
            for done, shard in enumerate(mine, start=1):
                stage.run_shard(config, materials, work, shard)
                write(launch / "shards.json", {"done": done})
                if done > before_this:
                    (launch / "further").touch()  # which the job's script asks for
        except Exception as error:
            text = tell(error, task.node, task.stage, store)
            again = (launch / "further").exists() or restarted() < terms.restarts
            return _decide(launch, AGAIN if again else FAILED, f"shard {shard}: {text}")
    write(launch / "usage.json", Usage.now().since(before).__dict__)
    return _decide(launch, SEALED, f"{len(mine)} shards are done")


def _earlier(launch: Path, job: str) -> list[dict[str, Any]]:
    """What earlier starts of this task had done."""
    found = (read(path / "shards.json") for path in launch.parent.glob(f"{job}.*") if path != launch)
    return [each for each in found if each is not None]


def restarted() -> int:
    """How often Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _decide(launch: Path, decision: str, outcome: str) -> str:
    """Leaves the decision for the job's script; returns it."""
    draft = launch / ".decision"
    draft.write_text(f"{decision}\n{outcome}\n")
    os.replace(draft, launch / "decision")
    print(f"{decision}: {outcome}", flush=True)
    return decision


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether a signal to stop has arrived, whoever else handles it."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    found: set[int] = set()

    def told() -> bool:
        with suppress(BlockingIOError):
            found.update(os.read(read, 4096))
        return bool(found & set(STOP))

    try:
        yield told
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def standstill(folder: Path) -> tuple[int, str]:
    """How many attempts, this one among them, have followed each other without getting further, and where that is."""
    best, since, where, said = -1, 0, "the start", "it was killed"
    for event in Tail(folder / "events.jsonl").read():
        if event["event"] == "attempt":
            since += 1
        elif event["event"] == "progress" and event["done"] > best:
            best, since = event["done"], 0
            where = f"{event['done']}/{event['total']} {event['unit']}"
        elif event["event"] == "end":
            said = event["outcome"]
    return since, f"{since - 1} attempts ended at {where} without getting further; of the last one: {said}"
