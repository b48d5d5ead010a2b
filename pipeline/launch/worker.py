"""What runs inside a job: take the lease, run the stage, seal its product, write its statement."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import environment, ledger, registry
from pipeline.codehash import code_digests
from pipeline.errors import AtomError
from pipeline.events import FileReport
from pipeline.lease import Lease
from pipeline.stage import Stage, identity
from pipeline.store import Artifact, Store, sha256_file


class Interrupted(BaseException):
    """The job was told to stop. Not an Exception, so that no stage swallows it."""


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

    def json(self) -> dict[str, Any]:
        return asdict(self)


def work(spec: dict[str, Any]) -> str:
    """Runs one node to its sealed artifact. Returns "sealed", "busy" (another worker holds the key) or a failure sentence.

    Never raises for what a stage does: the job's outcome is a value, in `events.jsonl` and in the ledger.
    """
    task = Task(**spec)
    store = Store(Path(task.home))
    report = FileReport(store.logs / task.run / task.node)
    try:
        with _stop_signals():
            outcome = _attempt(task, store, report)
    except Interrupted:
        outcome = "interrupted"
    report.event("end", outcome=outcome)
    report.close()
    return outcome


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise Interrupted in the main thread, once: a second one must not cut the clean-up short."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _attempt(task: Task, store: Store, report: FileReport) -> str:
    folder = store.work(task.key)
    lease = Lease.take(folder)
    if lease is None:
        return "busy"
    out = folder / f"out.{lease.number}"
    started, usage_before = time.time(), _cpu_seconds()
    stage, materials = registry.stage(task.stage), {}
    config = stage.config.model_validate(task.config)
    done = False
    try:
        if store.sealed(task.key):
            return "sealed"
        report.event("start", stage=task.stage, key=task.key, pid=os.getpid())
        materials = {role: store.open(key) for role, key in task.inputs.items()}
        for stale in folder.glob("out.*"):
            shutil.rmtree(stale)
        (folder / "state").mkdir(exist_ok=True)
        out.mkdir()
        stage.run(config, materials, folder / "state", out, report)
        if lease.lost:
            raise AtomError(f"another worker took over {task.key} while this one was out of reach; its product stands")

        def record(made: Artifact) -> None:
            _refuse_second_digest(stage, made, store)
            _state(task, stage, config, materials, store, started, usage_before, report, {made.key: made.digest}, "sealed")

        store.seal(out, task.key, record)
        done = True
        return "sealed"
    except (Exception, Interrupted) as error:
        text = _sentence(error, task, store)
        if not isinstance(error, (AtomError, Interrupted)) and not _disk_full(error):
            traceback.print_exc()
        print(f"{task.node}: {text}", file=sys.stderr, flush=True)
        _record_failure(task, stage, config, materials, store, started, usage_before, report, text)
        return text
    finally:
        shutil.rmtree(out, ignore_errors=True)
        lease.release()
        if done:
            shutil.rmtree(folder, ignore_errors=True)


def _sentence(error: BaseException, task: Task, store: Store) -> str:
    if isinstance(error, Interrupted):
        return f"interrupted by {error}; run the same command to go on"
    if _disk_full(error):
        return f"the disk that holds {store.home} is full; free some space and run the same command to go on"
    if isinstance(error, AtomError):
        return str(error)
    return f"a bug in stage {task.stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _refuse_second_digest(stage: Stage, made: Artifact, store: Store) -> None:
    """A bitwise stage must give the digest that it gave before in this environment. Raises AtomError if it does not."""
    here = environment.fingerprint()
    for _, body in ledger.read(store.ledger, made.key):
        before = {s["name"]: s["digest"]["sha256"] for s in body["subject"]}.get(made.key)
        then = body["predicate"]["buildDefinition"]["internalParameters"]["environment"]["fingerprint"]
        if stage.promise == "bitwise" and before not in (None, made.digest) and then == here:
            if code_digests(registry.STAGES[stage.name]) != ledger.code_of(body):
                continue  # other code may give other bytes; `plan` shows such artifacts as stale
            raise AtomError(
                f"{made.key} gave digest {made.digest[:12]} but gave {before[:12] if before else ''} before in this same "
                "environment, so it is not reproducible here; look for a seed, a clock or threads in the stage"
            )


def _cpu_seconds() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


def _state(
    task: Task,
    stage: Stage,
    config: Any,
    materials: dict[str, Artifact],
    store: Store,
    started: float,
    cpu_before: float,
    report: FileReport,
    subject: dict[str, str],
    outcome: str,
) -> None:
    finished, cpu = time.time(), _cpu_seconds() - cpu_before
    usage = {
        "wall_seconds": round(finished - started, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "energy_joules_estimate": round(cpu * task.watts_per_core, 1),
        "energy_method": (
            f"estimate: CPU seconds of the job x {task.watts_per_core} W per busy core, from the cluster profile; "
            "not measured, cooling and idle power left out"
        ),
        "figures": report.figures,
    }
    body = ledger.statement(
        subject=subject,
        stage=stage.name,
        version=stage.version,
        node=task.node,
        key=task.key,
        config=identity(config),
        materials=materials,
        code=code_digests(registry.STAGES[stage.name]),
        environment={
            "fingerprint": environment.fingerprint(),
            "python": sys.version.split()[0],
            "packages": environment.packages(),
            "device": environment.device(),
        },
        invocation=f"{task.run}/{task.node}",
        started=started,
        finished=finished,
        usage=usage,
        outcome=outcome,
    )
    ledger.write(store.ledger, task.key, body)
    report.event("usage", **usage)


def _record_failure(
    task: Task,
    stage: Stage,
    config: Any,
    materials: dict[str, Artifact],
    store: Store,
    started: float,
    cpu_before: float,
    report: FileReport,
    text: str,
) -> None:
    """The statement of a failed attempt; its subject is the attempt's events, which are what is left of it."""
    events = store.logs / task.run / task.node / "events.jsonl"
    subject = {f"{task.run}/{task.node}/events.jsonl": sha256_file(events)}
    try:
        _state(task, stage, config, materials, store, started, cpu_before, report, subject, text)
    except OSError as error:  # a full disk: the failure is told on the terminal all the same
        print(f"{task.node}: the statement of this attempt could not be written: {error}", file=sys.stderr, flush=True)


def main(path: str) -> None:
    """Runs a task from its JSON file without submitit, for debugging: python -m pipeline.launch.worker TASK.json"""
    print(work(json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main(sys.argv[1])
