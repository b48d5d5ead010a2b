"""What runs inside a job: take the lease, run the stage, seal its product, write its statement."""

from __future__ import annotations

import errno
import os
import re
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
from pipeline.errors import AtomError, Interrupted
from pipeline.events import FileReport
from pipeline.lease import Lease
from pipeline.stage import identity
from pipeline.store import Artifact, Store, sha256_file


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
    """Runs one node to its sealed artifact. Returns "sealed", "busy" (another worker has it) or a failure sentence.

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
    attempt = Attempt(task, store, report)
    out = folder / f"out.{lease.number}"
    try:
        if store.sealed(task.key):
            return "sealed"
        report.event("start", stage=task.stage, key=task.key, pid=os.getpid())
        attempt.materials = {role: store.open(key) for role, key in task.inputs.items()}
        for stale in folder.glob("out.*"):
            shutil.rmtree(stale)
        (folder / "state").mkdir(exist_ok=True)
        out.mkdir()
        attempt.stage.run(attempt.config, attempt.materials, folder / "state", out, report)
        if lease.lost:
            raise AtomError(f"another worker took over {task.key} while this one was out of reach; its product stands")
        store.seal(out, task.key, attempt.record)
        return "sealed"
    except (Exception, Interrupted) as error:
        text = _sentence(error, task, store)
        if not isinstance(error, (AtomError, Interrupted, ImportError)) and not _disk_full(error):
            traceback.print_exc()
        print(f"{task.node}: {text}", file=sys.stderr, flush=True)
        attempt.record_failure(text)
        return text
    finally:
        shutil.rmtree(out, ignore_errors=True)
        lease.release()
        if store.sealed(task.key):
            shutil.rmtree(folder, ignore_errors=True)


def _sentence(error: BaseException, task: Task, store: Store) -> str:
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}); run the same command to go on"
    if _disk_full(error):
        return f"the disk that holds {store.home} is full; free some space and run the same command to go on"
    if isinstance(error, AtomError):
        return str(error)
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("pipeline", "stages", "release"):
        return f"stage {task.stage} needs {error.name}; install atom-release[data,train] and run the same command again"
    return f"a bug in stage {task.stage}: {type(error).__name__}: {error}; the traceback is in its log".replace(
        "\n", " "
    )


def _without_places(text: str, home: Path) -> str:
    """A sentence as a statement may keep it: statements are published, and no folder of a machine belongs there."""
    text = text.replace(str(home), "$ATOM_HOME")
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)


def _disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Attempt:
    """One try at a node, from its start to the statement about it."""

    def __init__(self, task: Task, store: Store, report: FileReport) -> None:
        self.task, self.store, self.report = task, store, report
        self.stage = registry.stage(task.stage)
        self.config = self.stage.config.model_validate(task.config)
        self.materials: dict[str, Artifact] = {}
        self.started, self.cpu_before = time.time(), _cpu_seconds()
        self.code = code_digests(registry.STAGES[task.stage])

    def record(self, made: Artifact) -> None:
        """The statement of a product, written just before it is sealed. Raises AtomError if it must not be."""
        self._refuse_second_digest(made)
        self._state({made.key: made.digest}, "sealed")

    def record_failure(self, text: str) -> None:
        """The statement of a failed attempt; its subject is the attempt's events, which are what is left of it."""
        name = f"{self.task.run}/{self.task.node}/events.jsonl"
        try:
            self._state({name: sha256_file(self.store.logs / name)}, _without_places(text, self.store.home))
        except OSError as error:  # a full disk: the failure itself is told all the same
            print(f"{self.task.node}: no statement of this attempt: {error}", file=sys.stderr, flush=True)

    def _refuse_second_digest(self, made: Artifact) -> None:
        """A bitwise stage must give the digest that it gave before from these inputs with this code, here."""
        if self.stage.promise != "bitwise":
            return
        here = environment.fingerprint()
        for _, body in ledger.read(self.store.ledger, made.key):
            before = {s["name"]: s["digest"]["sha256"] for s in body["subject"]}.get(made.key)
            materials = {role: a.digest for role, a in self.materials.items()}
            same = ledger.environment_of(body)["fingerprint"] == here and ledger.code_of(body) == self.code
            same = same and ledger.materials_of(body) == materials
            if before not in (None, made.digest) and same:
                raise AtomError(
                    f"{made.key} came out as {made.digest[:12]} but as {before[:12]} before, with the same code in the "
                    "same environment, so it is not reproducible; look for a seed, a clock or threads in the stage"
                )

    def _state(self, subject: dict[str, str], outcome: str) -> None:
        finished, cpu = time.time(), _cpu_seconds() - self.cpu_before
        watts = self.task.watts_per_core
        usage = {
            "wall_seconds": round(finished - self.started, 3),
            "cpu_seconds": round(cpu, 3),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "energy_joules_estimate": round(cpu * watts, 1),
            "energy_method": f"estimate: CPU seconds of the job x {watts} W per busy core, from the cluster profile; "
            "not measured; cooling and idle power are left out",
            "figures": self.report.figures,
        }
        body = ledger.statement(
            subject=subject,
            stage=self.stage.name,
            version=self.stage.version,
            node=self.task.node,
            key=self.task.key,
            config=identity(self.config),
            materials=self.materials,
            code=self.code,
            environment=environment.describe(),
            invocation=f"{self.task.run}/{self.task.node}",
            started=self.started,
            finished=finished,
            usage=usage,
            outcome=outcome,
        )
        ledger.write(self.store.ledger, self.task.key, body)
        self.report.event("usage", **usage)
