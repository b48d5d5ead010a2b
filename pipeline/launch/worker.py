"""What runs inside a job: take the lease, run the stage, seal its product, write its statement."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import environment, input_integrity, json_files, provenance
from pipeline.core.code_digests import code_digests
from pipeline.core.errors import AtomError, Failure, Interrupted, Kind, MachineError, PeerLost
from pipeline.core.events import FileReport, FollowerReport
from pipeline.core.json_files import Damaged
from pipeline.core.lease import Lease
from pipeline.core.stage import identity, operation
from pipeline.core.store import Artifact, Store, sha256_file
from pipeline.graph import registry
from pipeline.graph.checkpoints import Checkpoint
from pipeline.launch.checkpoint_artifacts import Products
from pipeline.launch.failure_messages import report_failure, strip_paths
from pipeline.launch.rendezvous import FAILED_USAGE_SECONDS, FOLLOWED, USAGE_SECONDS, Ranks, Usage, end_process

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""By whom a stage is told to stop: a launcher, a terminal, or Slurm before a time limit or a preemption."""
WAIT_SECONDS = 1.0
OPERATIONS: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[dict[str, Any]])


class _UsageFile(TypedDict):
    cpu_seconds: float
    peak_memory_bytes: int


USAGE: TypeAdapter[Any] = TypeAdapter(_UsageFile)


@dataclass(frozen=True)
class Task:
    """All that a job needs to know, as plain values: what it pickles is small and stays readable."""

    home: str
    run: str
    node: str
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    key: str
    watts_per_core: float
    ranks: int
    gpus: int = 0
    watts_per_gpu: float = 0.0

    def json(self) -> dict[str, Any]:
        return asdict(self)


def work(spec: dict[str, Any]) -> str:
    """Runs one node to its sealed artifact. Returns "sealed", "busy" (another worker has it) or a failure sentence.

    Never raises for what a stage does: the job's outcome is a value, in `events.jsonl` and in the ledger. If the stage
    has several ranks, all of them call this; rank 0 keeps lease, report and product, the others only run the stage. A
    process of several ends with exit code 1 if the launch has failed.
    """
    task = Task(**spec)
    store = Store(Path(task.home))
    outcome = attempt(task, store, Ranks.from_environment(task.ranks, store.logs / task.run / task.node))
    if isinstance(outcome, str):
        return outcome
    if task.ranks > 1 and outcome.kind is not Kind.STOPPED:
        end_process(1)
    return outcome.text


def attempt(
    task: Task, store: Store, ranks: Ranks, on_outcome: Callable[[str | Failure], None] = lambda outcome: None
) -> str | Failure:
    """What each rank does. on_outcome: called on rank 0 once the outcome is on record, by whatever thread ends the
    attempt; the process may go right after."""
    if ranks.rank:
        return _run_follower(task, store, ranks)
    report = FileReport(store.logs / task.run / task.node)

    def end(outcome: str | Failure) -> None:
        report.end(outcome)
        on_outcome(outcome)
        if isinstance(outcome, Failure):
            ranks.finish()

    try:
        with _stop_signals():
            outcome = _run_attempt(task, store, report, ranks, end)
    except Interrupted:
        outcome = Failure("interrupted", Kind.STOPPED)
    except OSError as error:  # such as a file in the place of the work folder
        report.ending.acquire()
        outcome = report_failure(error, task.node, task.stage, store)
        ranks.announce(outcome)
    if isinstance(outcome, str) or outcome.kind is Kind.STOPPED:
        ranks.cancel_rendezvous(outcome if isinstance(outcome, str) else outcome.text)
    end(outcome)
    report.close()
    return outcome


@contextmanager
def _stop_signals() -> Iterator[None]:
    """A signal to stop raises Interrupted in the main thread, once: a second one must not cut the clean-up short."""

    def stop(number: int, frame: Any) -> None:
        for stop_signal in STOP:
            signal.signal(stop_signal, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    previous_handlers = {stop_signal: signal.signal(stop_signal, stop) for stop_signal in STOP}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher blocked it on the way here
    try:
        yield
    finally:
        for stop_signal, handler in previous_handlers.items():
            signal.signal(stop_signal, handler)


def _run_follower(task: Task, store: Store, ranks: Ranks) -> str | Failure:
    """A rank other than 0: runs the stage once rank 0 has called, and writes nothing but its log and its usage. If it
    fails, it says so to all; if another one does, the process ends."""
    usage_at_start, folder = Usage.now(), store.work(task.key)

    def usage() -> Usage:
        return Usage.now().since(usage_at_start)

    with ranks.watch_failures(lambda failure: ranks.exit_on_peer_failure(failure, usage())):
        try:
            with _stop_signals():
                rendezvous = ranks.join_rendezvous()
                if rendezvous is not None:
                    stage = registry.stage(task.stage)
                    config = stage.config.model_validate(task.config)
                    materials = {role: store.open(key) for role, key in task.inputs.items()}
                    report = FollowerReport(lambda failure: ranks.fail(failure, usage()))
                    with ranks.environment(rendezvous):
                        stage.run(config, materials, folder / "state", folder / rendezvous.out, report)
            ranks.record_end(FOLLOWED, usage())
            return FOLLOWED
        except (Exception, Interrupted) as error:
            failure = report_failure(error, task.node, task.stage, store)
            if isinstance(error, PeerLost):
                ranks.find_cause(failure)  # the watch ends this process if somebody takes the blame
        if failure.kind is not Kind.STOPPED:
            ranks.fail(failure, usage())
        ranks.record_end(failure.text, usage())
    return failure


def _run_attempt(
    task: Task, store: Store, report: FileReport, ranks: Ranks, end: Callable[[str | Failure], None]
) -> str | Failure:
    folder, turns = store.work(task.key), 0
    lease = Lease.take(folder)
    while lease is None and "SLURM_JOB_ID" in os.environ:  # a job has its place already: it waits for its turn
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
    out = folder / f"out.{lease.number}"

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
        lease.on_lost = exit_superseded
    try:
        if store.sealed(task.key):
            return "sealed"
        report.event("start", stage=task.stage, key=task.key, pid=os.getpid(), ranks=task.ranks)
        with ranks.watch_failures(report.fail):
            with ranks.report_busy(turns):
                attempt.materials = {role: store.open(key) for role, key in task.inputs.items()}
                input_integrity.check(store.logs / task.run, attempt.materials.values())
                report.seal_product = Products(attempt, lease).seal
                for stale in folder.glob("out.*"):
                    shutil.rmtree(stale)
                (folder / "state").mkdir(exist_ok=True)
                attempt.operations = _record_operation(folder / "operations.json", attempt.operations[0])
                out.mkdir()
            with ranks.environment(ranks.open_rendezvous(out)):
                attempt.stage.run(attempt.config, attempt.materials, folder / "state", out, report)
        report.ending.acquire()
        if lease.lost:
            raise MachineError(
                f"another worker took over {task.key} while this one was out of reach; its product stands"
            )
        input_integrity.note(store.logs / task.run, store.seal(out, task.key, attempt.record))
        return "sealed"
    except (Exception, Interrupted) as error:
        report.ending.acquire()
        failure = report_failure(error, task.node, task.stage, store)
        if isinstance(error, PeerLost):
            failure = ranks.find_cause(failure)
        if failure.kind is not Kind.STOPPED:
            ranks.announce(failure)
        attempt.record_failure(failure)
        return failure
    finally:
        clean_up()


def _record_operation(path: Path, current: dict[str, Any]) -> list[dict[str, Any]]:
    """The ways in which the attempts at a key were run so far, kept beside what they left: a phase that was spread over
    ranks in two ways adds in two orders."""
    try:
        earlier = [entry for entry in json_files.read(path, OPERATIONS) if entry != current]
    except FileNotFoundError:  # the first attempt
        earlier = []
    except Damaged as error:
        json_files.report(error, "how earlier attempts were run is not stated")
        earlier = []
    path.write_text(json.dumps([*earlier, current]))
    return [*earlier, current]


def _read_usage(path: Path) -> Usage | None:
    """What a task of a job array wrote down that it used; None, with a report, if that cannot be read."""
    try:
        return Usage(**json_files.read(path, USAGE))
    except Damaged as error:
        json_files.report(error, "what that task used is not counted")
        return None


class Attempt:
    """One try at a node, from its start to the statement about it."""

    def __init__(self, task: Task, store: Store, report: FileReport, ranks: Ranks) -> None:
        self.task, self.store, self.report, self.ranks = task, store, report, ranks
        self.stage = registry.stage(task.stage)
        self.config = self.stage.config.model_validate(task.config)
        self.materials: dict[str, Artifact] = {}
        self.started, self.usage_at_start = time.time(), Usage.now()
        self.code = code_digests(registry.STAGES[task.stage])
        self.operations = [operation(self.config)]
        """How this attempt and those whose work it goes on from were run: each way once, the latest last."""

    def record(self, artifact: Artifact, part: Checkpoint | None = None) -> None:
        """The statement of a product, written just before it is sealed. Raises AtomError if it must not be.

        part: what the product is, if it is not the stage's own.
        """
        self.refuse_second_digest(artifact)
        self._write_statement({artifact.key: artifact.digest}, "sealed", part, None if part else artifact)

    def record_failure(self, failure: Failure) -> None:
        """The statement of a failed attempt; its subject is the attempt's events, which are what is left of it."""
        name = f"{self.task.run}/{self.task.node}/events.jsonl"
        published = Failure(strip_paths(failure.text, self.store.home), failure.kind)
        try:
            self._write_statement({name: sha256_file(self.store.logs / name)}, published)
        except OSError as error:  # a full disk: the failure itself is told all the same
            print(f"{self.task.node}: no statement of this attempt: {error}", file=sys.stderr, flush=True)

    def refuse_second_digest(self, artifact: Artifact) -> None:
        """A bitwise stage must give the digest that it gave before from these inputs with this code, here and run in
        the same way: another layout of ranks adds in another order."""
        if self.stage.promise(self.config) != "bitwise" or environment.device()["type"] != "cpu":
            return  # GPU kernels add in an order of their own
        fingerprint = environment.fingerprint()
        for _, body in provenance.read(self.store.ledger, artifact.key):
            earlier_digest = {s["name"]: s["digest"]["sha256"] for s in body["subject"]}.get(artifact.key)
            materials = {role: a.digest for role, a in self.materials.items()}
            is_same = (
                provenance.environment_of(body)["fingerprint"] == fingerprint and provenance.code_of(body) == self.code
            )
            is_same = is_same and provenance.materials_of(body) == materials
            is_same = is_same and provenance.operations_of(body) == self.operations
            if earlier_digest not in (None, artifact.digest) and is_same:
                raise AtomError(
                    f"{artifact.key} came out as {artifact.digest[:12]} but as {earlier_digest[:12]} before, with "
                    "the same code in the same environment, so it is not reproducible; look for a seed, a clock or "
                    "threads in the stage"
                )

    def _write_statement(
        self,
        subject: dict[str, str],
        outcome: str | Failure,
        part: Checkpoint | None = None,
        product: Artifact | None = None,
    ) -> None:
        failed = isinstance(outcome, Failure) and outcome.kind is not Kind.STOPPED
        timeout = FAILED_USAGE_SECONDS if failed else USAGE_SECONDS
        usages = [Usage.now().since(self.usage_at_start), *([] if part else self.ranks.peer_usages(timeout))]
        if product is not None:  # what tasks of a job array did beforehand
            shards = self.store.logs / self.task.run / self.task.node / "shards"
            usages += [
                process_usage
                for path in sorted(shards.glob("ranks/*/usage.json"))
                if (process_usage := _read_usage(path))
            ]
        finished, cpu = time.time(), sum(process_usage.cpu_seconds for process_usage in usages)
        watts, gpu_seconds = self.task.watts_per_core, (finished - self.started) * self.task.gpus
        gpus = {"gpus": self.task.gpus, "gpu_seconds": round(gpu_seconds, 3)} if self.task.gpus else {}
        board = f", and allotted GPU seconds x {self.task.watts_per_gpu} W per GPU" if gpus else ""
        usage = {
            "wall_seconds": round(finished - self.started, 3),
            "cpu_seconds": round(cpu, 3),
            **gpus,
            "peak_memory_bytes": max(process_usage.peak_memory_bytes for process_usage in usages),
            "ranks": self.task.ranks,
            "ranks_counted": len(usages),
            "energy_joules_estimate": round(cpu * watts + gpu_seconds * self.task.watts_per_gpu, 1),
            "energy_method": f"estimate: CPU seconds of all ranks x {watts} W per busy core{board}, from the cluster "
            "profile; not measured; cooling and idle power are left out",
            "figures": dict(self.report.figures),
        }
        body = provenance.statement(
            subject=subject,
            stage=self.stage.name,
            version=self.stage.version,
            node=part.node if part else self.task.node,
            key=part.key if part else self.task.key,
            checkpoint_of={"key": part.phase, "step": part.step} if part else None,
            config=identity(self.config),
            operations=self.operations,
            materials=self.materials,
            code=self.code,
            environment=environment.describe(),
            invocation=f"{self.task.run}/{self.task.node}",
            started=self.started,
            finished=finished,
            usage=usage,
            outcome=outcome.text if isinstance(outcome, Failure) else outcome,
            kind=outcome.kind if isinstance(outcome, Failure) else None,
            product=product,
        )
        provenance.write(self.store.ledger, part.key if part else self.task.key, body)
        if part is None:
            self.report.event("usage", **usage)
