"""The entry point of a Slurm job: the worker, with the handling of signals, time limits and restarts.

Rank 0 writes its decision about the job to the file `decision` of the launch (rendezvous.py). The job's script acts on
it, because the Slurm commands are outside of a stage's container. An attempt that a signal or a failure of the machine
ended is started again while attempts make progress, measured by the stage's own reports, so a crash loop ends by
itself. Failures that would repeat (a recipe, a gate, a budget) are final. An attempt that got further, or the first one
that did not, is launched again in the same allocation.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import submitit

from pipeline.core import input_integrity, json_files, process
from pipeline.core.environment import node_name
from pipeline.core.errors import Failure, Interrupted, Kind
from pipeline.core.events import EventTail, FileReport
from pipeline.core.json_files import Damaged
from pipeline.core.log_summary import SummaryWriter
from pipeline.core.process import Companion
from pipeline.core.stage import ServerPlace
from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph.run import BODY
from pipeline.launch import bad_nodes, clean_environment, device_test, preflight
from pipeline.launch.attempt import Task
from pipeline.launch.bad_nodes import BadNode
from pipeline.launch.diagnoses import report_failure
from pipeline.launch.rendezvous import (
    Decision,
    Ranks,
    Usage,
    Verdict,
    end_process,
    launch_folder,
    launch_number,
    read,
    write,
)
from pipeline.launch.worker import STOP, attempt, stop_signals


@dataclass(frozen=True)
class JobLimits:
    """The limits of a job: the budget from the recipe, the rest from the profile."""

    budget: budget.Limits | None
    restarts: int
    free_gb: float
    scratch: str | None
    # The names of the variables that the profile forwards or sets.
    variables: tuple[str, ...] = ()
    avoid_seconds: int = 0
    # FLOP/s that a GPU must reach; 0: any; None: its products and the collectives are not tested.
    device_test_flops: float | None = None


def _begin(task: Task, limits: JobLimits) -> tuple[submitit.JobEnvironment, Store]:
    clean_environment.require(limits.variables)
    process.collect_rarely()
    process.share_home(Path(task.home))
    return submitit.JobEnvironment(), Store(Path(task.home))


def run(task: Task, limits: JobLimits) -> str:
    """Runs one node as a Slurm job, on each of its ranks.

    Returns the decision on rank 0, and the outcome on other ranks; if a job of several ranks has failed, each of
    its processes ends with exit code 1 instead.
    """
    slurm_job, store = _begin(task, limits)
    folder = store.logs / task.run / task.node
    launch = launch_folder(folder, slurm_job.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    # By this file the job's script and the checks see which ranks have started, and where.
    (launch / f"started-{slurm_job.global_rank}").write_text(node_name() + "\n")
    ranks = Ranks.from_environment(task.ranks, folder)
    if ranks.rank:
        return _run_follower(task, limits, store, ranks)
    report = FileReport(folder)
    report.event("attempt", job=slurm_job.raw_job_id, launch=launch.name, host=node_name(), pid=os.getpid())
    companion: Companion | None = None
    begun, keys = False, list[str]()
    with watch_stop_signals() as stop_signals_received:

        def record_outcome(outcome: str | Failure) -> None:
            """Acts on the recorded outcome: decides about the job, and releases the other processes.

            The thread that ends the attempt calls it.
            """
            if outcome == "sealed":
                # From the last stage on, so that usually one look is enough.
                is_last = all(store.sealed(key) for key in reversed(keys))
                decision = Decision.DONE if is_last else Decision.SEALED
            else:
                failure = outcome if isinstance(outcome, Failure) else Failure(outcome)
                stall, stopped = standstill(folder), stop_signals_received()
                if failure.kind.final or stall.repeated or not (stopped or stall.since <= limits.restarts):
                    decision = Decision.FAILED
                # Slurm needs the nodes (USR2), or they may be the cause. srun itself sends TERM when a rank has died;
                # when Slurm sends it, the job's script sees that in the state of the job.
                elif stopped - {signal.SIGTERM} or stall.since > 1 or not begun or failure.bad_node:
                    decision = Decision.RESTART
                else:
                    decision = Decision.RELAUNCH
                avoid_node(failure, task, limits, store)
            Verdict.of(decision, outcome).write(launch)
            if isinstance(outcome, Failure):
                ranks.finish()  # other ranks do not wait for the tracking server
            if companion is not None and decision in (Decision.RESTART, Decision.RELAUNCH):
                companion.kill()  # the time limit may be near; the next start sends the rest
            elif companion is not None:
                companion.close(decision in (Decision.DONE, Decision.FAILED), quick=isinstance(outcome, Failure))

        problem = _check(task, limits, store, ranks)
        if (stall := standstill(folder)).since > limits.restarts + 1:
            problem = problem or Failure(stall.where, Kind.BUG)
        try:
            # From the file of the run, so that the jobs of a large run are not each as large as it.
            keys = [node["key"] for node in json_files.read(store.logs / task.run / "run.json", BODY)["nodes"]]
        except (FileNotFoundError, Damaged) as error:
            text = f"run.json of {task.run} cannot be read ({error}); restore it, or submit again"
            problem = problem or Failure(text)
        if (budget_problem := budget.exceeded(limits.budget, store, keys)) is not None:
            problem = problem or Failure(budget_problem, Kind.USER)
        if problem is not None:
            ranks.announce(problem)
            print(f"{task.node}: {problem.text}", file=sys.stderr, flush=True)
            report.end(problem)
            record_outcome(problem)
            SummaryWriter(folder).close()
            outcome: str | Failure = problem
        else:
            begun, companion = True, Companion(store.home, task.run, whole=False)
            outcome = attempt(task, store, ranks, record_outcome)
        report.close()
    if isinstance(outcome, Failure) and ranks.size > 1:
        end_process()  # and srun ends the remaining ranks
    verdict = Verdict.read(launch)
    assert verdict is not None, "record_outcome wrote it"
    return verdict.decision


def _check(task: Task, limits: JobLimits, store: Store, ranks: Ranks) -> Failure | None:
    """Returns the problem of a node, by the checks that the ranks make together before a stage."""
    problem = preflight.check(store.home, ranks, limits.free_gb, limits.scratch)
    least = limits.device_test_flops
    if problem is None and task.gpus and task.load_stage().trains and least is not None:
        problem = device_test.check(ranks, least)
    return problem


def _run_follower(task: Task, limits: JobLimits, store: Store, ranks: Ranks) -> str:
    """Runs a rank other than 0.

    Its process ends with exit code 1 if the launch fails, but not if it is stopped: rank 0 then still saves, and
    srun would end it.
    """
    problem = _check(task, limits, store, ranks)
    if problem is not None:
        print(f"{task.node}: {problem.text}", file=sys.stderr, flush=True)
        ranks.announce(problem)
        ranks.exit_after_failure()
    outcome = attempt(task, store, ranks)
    return outcome if isinstance(outcome, str) else outcome.text


def run_shards(task: Task, tasks: int, limits: JobLimits) -> str:
    """Runs the shards of this task of a job array: the shard of its number, and every `tasks`-th shard after it.

    Returns the decision: after an error the task is started again while it makes progress, and otherwise as often as
    the profile allows. Finished shards are kept.
    """
    store, launch = _begin_task(task, limits, "shards")
    stage, usage_at_start = task.load_stage(), Usage.now()
    assert stage.run_shard is not None, "only such stages are submitted so"
    if problem := preflight.check_node(store.home, limits.free_gb, limits.scratch):
        return _end_task(problem, task, limits, store, launch)
    own_shards: list[int] = []
    if not store.sealed(task.key):
        work = store.work(task.key) / "state"
        work.mkdir(parents=True, exist_ok=True)
        config = stage.config.model_validate(task.config)
        own_shards = list(range(int(os.environ["SLURM_ARRAY_TASK_ID"]), stage.shards(config), tasks))
        earlier_done = _earlier_done(launch)
        location = "its inputs"
        try:
            materials = {role: store.open(key) for role, key in task.inputs.items()}
            input_integrity.check(store.logs / task.run, materials.values())
            for done, shard in enumerate(own_shards, start=1):
                location = f"shard {shard}"
                stage.run_shard(config, materials, work, shard)
                write(launch / "shards.json", {"done": done})
                if done > earlier_done:
                    (launch / "further").touch()  # which the job's script reads
        except Exception as error:
            failure = report_failure(error, task.node, task.stage, store)
            return _end_task(failure, task, limits, store, launch, f"{location}: ")
    write(launch / "usage.json", Usage.now().since(usage_at_start).__dict__)
    Verdict(Decision.SEALED, f"{len(own_shards)} shards are done").write(launch)
    return Decision.SEALED


def run_server(task: Task, limits: JobLimits) -> str:
    """Runs a server for a node, in this task of a job array, until the stage has ended.

    Returns the decision: a server that dies is started again as long as it has answered before, and otherwise as
    often as the profile allows.
    """
    store, launch = _begin_task(task, limits, "servers")
    place = ServerPlace(store, task.key, task.run, launch, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    if problem := preflight.check_node(store.home, limits.free_gb, limits.scratch):
        return _end_task(problem, task, limits, store, launch)
    stage = task.load_stage()
    assert stage.serve is not None, "only such stages are submitted so"
    try:
        with stop_signals():
            place.folder.mkdir(exist_ok=True)
            stage.serve(stage.config.model_validate(task.config), place)
    except Interrupted:
        Verdict.of(Decision.RESTART, Failure("interrupted", Kind.STOPPED)).write(launch)
        return Decision.RESTART
    except Exception as error:
        return _end_task(report_failure(error, task.node, task.stage, store), task, limits, store, launch)
    Verdict(Decision.SEALED, "the stage has ended").write(launch)
    return Decision.SEALED


def avoid_node(failure: Failure, task: Task, limits: JobLimits, store: Store) -> None:
    """Has later starts avoid the node whose fault a failure is, if it is one's."""
    if not failure.bad_node or not limits.avoid_seconds:
        return
    until, job = int(time.time()) + limits.avoid_seconds, os.environ.get("SLURM_JOB_ID", "")
    try:
        bad_nodes.record(store, BadNode(until, failure.bad_node, failure.text, task.run, task.node, job))
    except OSError as error:  # the failure itself is reported all the same
        print(f"{task.node}: node {failure.bad_node} cannot be noted as bad: {error}", file=sys.stderr, flush=True)


def _begin_task(task: Task, limits: JobLimits, part: str) -> tuple[Store, Path]:
    """Begins a task of a job array. Returns the home, and the folder of this launch."""
    slurm_job, store = _begin(task, limits)
    launch = launch_folder(store.logs / task.run / task.node / part, slurm_job.raw_job_id)
    launch.mkdir(parents=True, exist_ok=True)
    (launch / "started-0").write_text(node_name() + "\n")
    return store, launch


def _end_task(
    failure: Failure, task: Task, limits: JobLimits, store: Store, launch: Path, location: str = ""
) -> Decision:
    """Ends a failed task of a job array: writes the decision whether it is started again, and returns it."""
    avoid_node(failure, task, limits, store)
    further = (launch / "further").exists()
    restart = not failure.kind.final and (further or _failed_starts(launch) < limits.restarts)
    decision = Decision.RESTART if restart else Decision.FAILED
    Verdict.of(decision, Failure(f"{location}{failure.text}", failure.kind)).write(launch)
    return decision


def _earlier_done(launch: Path) -> int:
    """Returns the most shards that an earlier start of this task has finished."""
    job = launch.name.partition(".")[0]
    records = (read(path / "shards.json") for path in launch.parent.glob(f"{job}.*") if path != launch)
    return max((record["done"] for record in records if record is not None), default=0)


def _failed_starts(launch: Path) -> int:
    """Returns the number of earlier starts of this task in a row that failed without getting further.

    One that Slurm preempted, or that was stopped, is no failure.
    """
    failures, job = 0, launch.name.partition(".")[0]
    for path in sorted(launch.parent.glob(f"{job}.*"), key=launch_number):
        verdict = None if path == launch else Verdict.read(path)
        if (path / "further").exists():
            failures = 0
        elif verdict is not None and verdict.decision is Decision.RESTART and verdict.kind is not Kind.STOPPED:
            failures += 1
    return failures


@contextmanager
def watch_stop_signals() -> Iterator[Callable[[], set[int]]]:
    """Returns a function for the signals to stop that have arrived, also if other code handles them."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # Python writes the number of each signal there before any handler runs, so none is missed.
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signals: set[int] = set()

    def stop_signals_received() -> set[int]:
        with suppress(BlockingIOError):
            signals.update(os.read(read_end, 4096))
        return signals & set(STOP)

    try:
        yield stop_signals_received
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.close(read_end)
        os.close(write_end)


@dataclass(frozen=True)
class Standstill:
    """The number of consecutive attempts without progress, including this one, and their position.

    `repeated` is True if the last two ended with the same unexpected exception, which is deterministic then.
    """

    since: int
    where: str
    repeated: bool


def standstill(folder: Path) -> Standstill:
    """Computes the standstill from the events of all attempts at a node."""
    best, since, position = -1.0, 0, "the start"
    ends: list[tuple[str, str | None]] = []
    launches: list[str] = []
    outcomes: dict[int, str] = {}
    for event in EventTail(folder / "events.jsonl").read():
        if event["event"] == "attempt":
            since += 1
            launches.append(str(event.get("launch", "")))
        elif event["event"] == "progress" and event["done"] > best:
            best, since, ends = event["done"], 0, []
            position = f"{event['done']}/{event['total']} {event['unit']}"
        elif event["event"] == "end":
            ends.append((event["outcome"], event.get("kind")))
            outcomes[len(launches)] = event["outcome"]
    # what a killed rank 0 could not record, the job's script may have
    earlier = launches[-2] if len(launches) > 1 else ""
    verdict = Verdict.read(folder / "ranks" / earlier) if earlier else None
    last_outcome = outcomes.get(len(launches) - 1) or (verdict.text if verdict else "it was killed")
    text = f"{since - 1} attempts ended at {position} without getting further; of the last one: {last_outcome}"
    repeated = len(ends) > 1 and ends[-1] == ends[-2] and ends[-1][1] == Kind.BUG
    return Standstill(since, text, repeated)
