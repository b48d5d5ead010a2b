"""The worker inside a job: takes the lease, runs the stage, seals its product, writes its statement."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.core import input_integrity, json_files, process
from pipeline.core.errors import Failure, Interrupted, Kind, MachineError, PeerLost
from pipeline.core.events import FileReport, FollowerReport
from pipeline.core.lease import Lease, draft_folder
from pipeline.core.log_summary import SummaryWriter
from pipeline.core.store import Artifact, Store
from pipeline.launch.attempt import Attempt, CheckpointArtifacts, StartRecords, Task
from pipeline.launch.diagnoses import report_failure
from pipeline.launch.rendezvous import FOLLOWED, Ranks, Usage, end_process

# Signals that stop a stage: from a launcher, a terminal, or Slurm before a time limit or a preemption.
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
WAIT_SECONDS = 1.0
OPERATIONS: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[dict[str, Any]])


def work(task: Task) -> str:
    """Runs one node to its sealed artifact. Returns "sealed", "busy" (another worker has it) or a failure sentence.

    Never raises for an error of the stage: the job's outcome is a value, in `events.jsonl` and in the ledger. If the
    stage has several ranks, all of them call this; rank 0 handles lease, report and product, the others only run the
    stage. With several ranks, each process ends with exit code 1 if the launch has failed.
    """
    process.collect_rarely()
    store = Store(Path(task.home))
    outcome = attempt(task, store, Ranks.from_environment(task.ranks, store.logs / task.run / task.node))
    if isinstance(outcome, str):
        return outcome
    if task.ranks > 1 and not outcome.kind.orderly:
        end_process()
    return outcome.text


def attempt(
    task: Task, store: Store, ranks: Ranks, on_outcome: Callable[[str | Failure], None] = lambda outcome: None
) -> str | Failure:
    """Runs the attempt on each rank, and returns its outcome.

    Args:
        task: The parameters of the job.
        store: The home.
        ranks: This process among the ranks of the stage.
        on_outcome: Called on rank 0 after the outcome is recorded, by the thread that ends the attempt; the process may
            exit right after.
    """
    if ranks.rank:
        return _run_follower(task, store, ranks)
    report = FileReport(store.logs / task.run / task.node)
    summaries = SummaryWriter(store.logs / task.run / task.node)

    def end(outcome: str | Failure) -> None:
        report.end(outcome)
        summaries.close()
        on_outcome(outcome)
        if isinstance(outcome, Failure):
            ranks.finish()

    try:
        with stop_signals():
            outcome = _run_attempt(task, store, report, ranks, end)
    except Interrupted:
        outcome = Failure("interrupted", Kind.STOPPED)
    except OSError as error:  # for example a file in the place of the work folder
        report.ending.acquire()
        outcome = report_failure(error, task.node, task.stage, store)
        ranks.announce(outcome)
    # The other ranks learn of a failure by its announcement, and of any other end here.
    if isinstance(outcome, str) or outcome.kind.orderly:
        ranks.cancel_rendezvous(outcome if isinstance(outcome, str) else outcome.text)
    end(outcome)
    report.close()
    return outcome


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raises Interrupted in the main thread on the first signal to stop.

    Later signals are ignored, since they must not interrupt the cleanup.
    """

    def stop(number: int, frame: Any) -> None:
        for stop_signal in STOP:
            signal.signal(stop_signal, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    previous_handlers = {stop_signal: signal.signal(stop_signal, stop) for stop_signal in STOP}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher had blocked it
    try:
        yield
    finally:
        for stop_signal, handler in previous_handlers.items():
            signal.signal(stop_signal, handler)


def _run_follower(task: Task, store: Store, ranks: Ranks) -> str | Failure:
    """Runs a rank other than 0: waits for the call of rank 0, runs the stage, and writes only its log and its usage.

    Its failure is announced to all; a failure of another rank ends the process.
    """
    usage_at_start, folder = Usage.now(), store.work(task.key)

    def usage() -> Usage:
        return Usage.now().since(usage_at_start)

    @cache
    def materials() -> dict[str, Artifact]:
        return {role: store.open(key) for role, key in task.inputs.items()}

    def help_to_check() -> None:
        input_integrity.help_to_check(store.logs / task.run, materials().values(), ranks.rank, ranks.size)

    with ranks.watch_failures(lambda failure: ranks.exit_on_peer_failure(failure, usage())):
        try:
            with stop_signals():
                rendezvous = ranks.join_rendezvous(help_to_check)
                if rendezvous is not None:
                    stage = task.load_stage()
                    config = stage.config.model_validate(task.config)
                    report = FollowerReport(rendezvous.lease, lambda failure: ranks.fail(failure, usage()))
                    out = draft_folder(folder, rendezvous.lease)
                    with ranks.environment(rendezvous):
                        stage.run(config, materials(), folder / "state", out, report)
            ranks.record_end(FOLLOWED, usage())
            return FOLLOWED
        except (Exception, Interrupted) as error:
            failure = report_failure(error, task.node, task.stage, store)
            if isinstance(error, PeerLost):
                ranks.find_cause(failure)  # the watch ends this process if another rank announces a failure
        if not failure.kind.orderly:
            ranks.fail(failure, usage())
        ranks.record_end(failure.text, usage())
    return failure


def _run_attempt(
    task: Task, store: Store, report: FileReport, ranks: Ranks, end: Callable[[str | Failure], None]
) -> str | Failure:
    folder, run, turns = store.work(task.key), store.logs / task.run, 0
    lease = Lease.take(folder)
    # A Slurm job holds its allocation, so it waits for its turn. On this machine, the launcher does other work.
    while lease is None and "SLURM_JOB_ID" in os.environ:
        if store.sealed(task.key):
            return "sealed"
        try:
            ranks.report_waiting(turns)
        except PeerLost as error:
            return Failure(str(error))
        time.sleep(WAIT_SECONDS)
        turns += 1
        lease = Lease.take(folder)
    if lease is None:
        return "busy"
    attempt = Attempt(task, store, report, ranks)
    out, report.lease = draft_folder(folder, lease.number), lease.number
    report.planned_tokens_per_s = task.planned_tokens_per_s

    def clean_up() -> None:
        shutil.rmtree(out, ignore_errors=True)
        lease.release()
        if store.sealed(task.key):
            shutil.rmtree(folder, ignore_errors=True)

    def abandon(failure: Failure) -> None:
        print(f"{task.node}: {failure.text}", file=sys.stderr, flush=True)
        ranks.announce(failure)
        attempt.record_failure(failure)
        clean_up()
        end(failure)

    def exit_superseded() -> None:
        print(f"{task.node}: a later start of this job has taken over; ending", file=sys.stderr, flush=True)
        os._exit(1)

    report.record_abandoned = abandon
    if "SLURM_JOB_ID" in os.environ:
        # Slurm may start a job again while its old processes live on, on a node that it gave up.
        lease.on_lost = exit_superseded
    try:
        # Another worker may have sealed the product between the look of the launcher and the lease.
        if store.sealed(task.key):
            return "sealed"
        report.event("start", stage=task.stage, key=task.key, pid=os.getpid(), ranks=task.ranks, gpus=task.gpus)
        with ranks.watch_failures(report.fail):
            # The other ranks wait at the rendezvous meanwhile, and give up without a sign of progress.
            with ranks.report_busy(turns, input_integrity.shared_progress(run).has_moved):
                attempt.materials = {role: store.open(key) for role, key in task.inputs.items()}
                input_integrity.check(run, attempt.materials.values())
                report.checkpoint_sealer = CheckpointArtifacts(attempt, lease).seal
                for stale in folder.glob("out.*"):  # drafts of killed attempts
                    shutil.rmtree(stale)
                (folder / "state").mkdir(exist_ok=True)
                attempt.operations = _record_operation(folder / "operations.json", attempt.operations[0])
                if attempt.stage.trains:
                    attempt.starts = StartRecords(folder, lease.number)
                    attempt.starts.add(store, task.key, attempt.started)
                out.mkdir()
            with ranks.environment(ranks.open_rendezvous(lease.number)):
                attempt.stage.run(attempt.config, attempt.materials, folder / "state", out, report)
        # From here on, no other thread ends the attempt as failed.
        report.ending.acquire()
        if lease.lost:
            raise MachineError(
                f"another worker took over {task.key} while this one was out of reach; its product stands"
            )
        input_integrity.note(run, store.seal(out, task.key, attempt.record))
        return "sealed"
    except (Exception, Interrupted) as error:
        report.ending.acquire()
        failure = report_failure(error, task.node, task.stage, store)
        if isinstance(error, PeerLost):
            failure = ranks.find_cause(failure)
        if not failure.kind.orderly:
            ranks.announce(failure)
        attempt.record_failure(failure)
        return failure
    finally:
        clean_up()


def _record_operation(path: Path, current: dict[str, Any]) -> list[dict[str, Any]]:
    """Records the distinct operational configs of all attempts at a key, beside their work, and returns them."""
    # A phase with two layouts of ranks adds in two orders, so its statement names both.
    earlier = json_files.read_optional(path, OPERATIONS, "how earlier attempts were run is not stated") or []
    operations = [*(entry for entry in earlier if entry != current), current]
    path.write_text(json.dumps(operations))
    return operations
