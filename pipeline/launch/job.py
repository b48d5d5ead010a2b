"""What a Slurm job runs: the worker, and around it what a cluster does to jobs.

What shall become of the job, rank 0 leaves in the file `decision` of the launch, for the job's script (slurm.py): the
Slurm commands are outside of a stage's container. An attempt that was told to stop, or that the machine failed, is
started again while attempts get further: what the stage reports as done is the measure, so a crash loop ends by itself.
What would fail again (a recipe, a gate, a budget) is final.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pipeline.core import input_integrity
from pipeline.core.errors import Failure, Kind
from pipeline.core.events import FileReport, Tail
from pipeline.core.store import Store
from pipeline.graph import registry
from pipeline.launch import clean_environment, preflight
from pipeline.launch.attempt import Task
from pipeline.launch.failure_messages import tell
from pipeline.launch.rendezvous import Ranks, Usage, end_process, launch_folder, node_name, read, write
from pipeline.launch.worker import STOP, attempt
from pipeline.tracking import budget, mlflow_sync

SEALED, DONE, AGAIN, FAILED = "sealed", "done", "again", "failed"
"""Decisions. done: sealed, and so is all that the run asked for."""


@dataclass(frozen=True)
class Terms:
    """nodes: all of the run, with their keys. budget: the recipe's. The rest is the profile's; variables: the names of
    those that it forwards or sets."""

    nodes: dict[str, str]
    budget: dict[str, float | None] | None
    restarts: int
    free_gb: float
    scratch: str | None
    variables: tuple[str, ...] = ()


def run(spec: dict[str, Any], terms_: dict[str, Any]) -> str:
    """Runs one node as a Slurm job, on each of its ranks. Returns the decision, or how another rank than 0 ended; if a
    job of several ranks has failed, each of its processes ends with exit code 1 instead."""
    task, terms = Task(**spec), Terms(**terms_)
    clean_environment.require(terms.variables)
    here, store = submitit.JobEnvironment(), Store(Path(task.home))
    folder = store.logs / task.run / task.node
    launch = launch_folder(folder, here.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    (launch / f"started-{here.global_rank}").touch()
    ranks = Ranks.here(task.ranks, folder)
    if ranks.rank:
        return _follow(task, terms, store, ranks)
    report = FileReport(folder)
    report.event("attempt", job=here.raw_job_id, launch=launch.name, host=node_name(), pid=os.getpid())
    companion: mlflow_sync.Companion | None = None
    with told_to_stop() as told:

        def ended(outcome: str | Failure) -> None:
            """Once the outcome is on record, from whatever thread ends the attempt."""
            stall = standstill(folder)
            if outcome == "sealed":
                decision = DONE if all(store.sealed(key) for key in terms.nodes.values()) else SEALED
            else:
                failure = outcome if isinstance(outcome, Failure) else Failure(outcome)
                again = not (failure.kind.final or stall.repeated) and (told() or stall.since <= terms.restarts)
                decision = AGAIN if again else FAILED
            _decide(launch, decision, outcome)
            if isinstance(outcome, Failure):
                ranks.close()  # the others need not wait for the tracking server
            if companion is not None and decision == AGAIN:
                companion.leave()  # the time limit may be near; the next start sends on
            elif companion is not None:
                companion.close({DONE: "FINISHED", FAILED: "FAILED"}.get(decision, ""), isinstance(outcome, Failure))

        lack = preflight.check(store.home, ranks, terms.free_gb, terms.scratch)
        if (stall := standstill(folder)).since > terms.restarts + 1:
            lack = lack or Failure(stall.where, Kind.BUG)
        if (spent := budget.exceeded(terms.budget, store, terms.nodes.values())) is not None:
            lack = lack or Failure(spent, Kind.USER)
        if lack is not None:
            ranks.announce(lack)
            print(f"{task.node}: {lack.text}", file=sys.stderr, flush=True)
            report.end(lack)
            ended(lack)
            outcome: str | Failure = lack
        else:
            companion = mlflow_sync.Companion(store.home, task.run)
            outcome = attempt(task, store, ranks, ended)
        report.close()
    if isinstance(outcome, Failure) and ranks.size > 1:
        end_process(1)  # and srun ends what is left of the others
    return (launch / "decision").read_text().split("\n")[0]


def _follow(task: Task, terms: Terms, store: Store, ranks: Ranks) -> str:
    """A rank other than 0. Its process ends with exit code 1 if the launch fails, but not if it is stopped: rank 0 then
    goes on to save, and srun would end it."""
    wrong = preflight.check(store.home, ranks, terms.free_gb, terms.scratch)
    if wrong is not None:
        print(f"{task.node}: {wrong.text}", file=sys.stderr, flush=True)
        ranks.announce(wrong)
        ranks.depart()
    outcome = attempt(task, store, ranks)
    return outcome if isinstance(outcome, str) else outcome.text


def run_shards(spec: dict[str, Any], number: int, tasks: int, terms_: dict[str, Any]) -> str:
    """Does every shard of a node's work that falls to this task of a job array: `number`, and each `tasks` further on.

    Returns the decision: after an error the task is started again while it gets further, and else as often as the
    profile allows. Shards that were done stay done.
    """
    task, terms = Task(**spec), Terms(**terms_)
    clean_environment.require(terms.variables)
    here, store = submitit.JobEnvironment(), Store(Path(task.home))
    launch = launch_folder(store.logs / task.run / task.node / "shards", here.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    (launch / "started-0").touch()
    stage, before = registry.stage(task.stage), Usage.now()
    assert stage.run_shard is not None, "only such stages are submitted so"
    lack = preflight.own(Path(task.home), terms.free_gb, terms.scratch)
    if lack:
        return _decide(launch, AGAIN if restarted() < terms.restarts else FAILED, Failure(lack))
    mine: list[int] = []
    if not store.sealed(task.key):
        work = store.work(task.key) / "state"
        work.mkdir(parents=True, exist_ok=True)
        config = stage.config.model_validate(task.config)
        mine = list(range(number, stage.shards(config), tasks))
        before_this = max((found["done"] for found in _earlier(launch, here.raw_job_id)), default=0)
        where = "its inputs"
        try:
            materials = {role: store.open(key) for role, key in task.inputs.items()}
            input_integrity.check(store.logs / task.run, materials.values())
            for done, shard in enumerate(mine, start=1):
                where = f"shard {shard}"
                stage.run_shard(config, materials, work, shard)
                write(launch / "shards.json", {"done": done})
                if done > before_this:
                    (launch / "further").touch()  # which the job's script asks for
        except Exception as error:
            failure = tell(error, task.node, task.stage, store)
            again = not failure.kind.final and ((launch / "further").exists() or restarted() < terms.restarts)
            told = Failure(f"{where}: {failure.text}", failure.kind)
            return _decide(launch, AGAIN if again else FAILED, told)
    write(launch / "usage.json", Usage.now().since(before).__dict__)
    return _decide(launch, SEALED, f"{len(mine)} shards are done")


def _earlier(launch: Path, job: str) -> list[dict[str, Any]]:
    """What earlier starts of this task had done."""
    found = (read(path / "shards.json") for path in launch.parent.glob(f"{job}.*") if path != launch)
    return [each for each in found if each is not None]


def restarted() -> int:
    """How often Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _decide(launch: Path, decision: str, outcome: str | Failure) -> str:
    """Leaves the decision for the job's script, with the kind of a failure and how the attempt ended; returns it."""
    failure = outcome if isinstance(outcome, Failure) else None
    text = failure.text if failure else str(outcome)
    draft = launch / ".decision"
    draft.write_text(f"{decision}\n{failure.kind if failure else ''}\n{text}\n")
    os.replace(draft, launch / "decision")
    print(f"{decision}: {text}", flush=True)
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


@dataclass(frozen=True)
class Standstill:
    """How many attempts, this one among them, have followed each other without getting further, and where that is.

    repeated: the last two of them ended with the same sentence of an unexpected exception, so it comes every time."""

    since: int
    where: str
    repeated: bool


def standstill(folder: Path) -> Standstill:
    """Read from the events of all attempts at a node."""
    best, since, where = -1, 0, "the start"
    ends: list[tuple[str, str | None]] = []
    for event in Tail(folder / "events.jsonl").read():
        if event["event"] == "attempt":
            since += 1
        elif event["event"] == "progress" and event["done"] > best:
            best, since, ends = event["done"], 0, []
            where = f"{event['done']}/{event['total']} {event['unit']}"
        elif event["event"] == "end":
            ends.append((event["outcome"], event.get("kind")))
    last = ends[-1][0] if ends else "it was killed"
    text = f"{since - 1} attempts ended at {where} without getting further; of the last one: {last}"
    repeated = len(ends) > 1 and ends[-1] == ends[-2] and ends[-1][1] == Kind.BUG
    return Standstill(since, text, repeated)
