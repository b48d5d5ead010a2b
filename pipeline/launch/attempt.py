"""One attempt at a node: its parameters, and the statement about its end."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import environment, json_files, provenance
from pipeline.core.code_digests import code_digests
from pipeline.core.errors import AtomError, Failure, Kind
from pipeline.core.events import FileReport
from pipeline.core.json_files import Damaged
from pipeline.core.stage import identity, operation
from pipeline.core.store import Artifact, Store, sha256_file
from pipeline.graph import registry
from pipeline.graph.checkpoints import Checkpoint
from pipeline.launch.failure_messages import strip_paths
from pipeline.launch.rendezvous import FAILED_USAGE_SECONDS, USAGE_SECONDS, Ranks, Usage
from pipeline.launch.start_records import StartRecords


class _UsageFile(TypedDict):
    cpu_seconds: float
    peak_memory_bytes: int


USAGE: TypeAdapter[Any] = TypeAdapter(_UsageFile)


@dataclass(frozen=True)
class Task:
    """The parameters of a job as plain values, so that its pickle is small. peaks: FLOP/s of a GPU by family of
    precisions, as the profile states them."""

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
    server_gpus: int = 0  # of each of its servers in jobs of their own
    peaks: dict[str, float] = field(default_factory=dict)


ALIVE = "alive"
"""The file of a server's start whose time is its last sign of life; `started-0` has that of its beginning."""


def server_seconds(folder: Path, start: float, end: float) -> float:
    """Seconds between two times in which the servers of a stage ran, of all together, by the clock of the file system.
    folder: of the servers."""
    seconds = 0.0
    for alive in folder.glob(f"ranks/*/{ALIVE}"):
        with suppress(OSError):  # its folder is being removed
            begin, last = alive.with_name("started-0").stat().st_mtime, alive.stat().st_mtime
            seconds += max(0.0, min(end, last) - max(start, begin))
    return seconds


def _read_usage(path: Path) -> Usage | None:
    """The recorded usage of a task of a job array; None, with a report, if it is unreadable."""
    try:
        return Usage(**json_files.read(path, USAGE))
    except Damaged as error:
        json_files.report(error, "what that task used is not counted")
        return None


class Attempt:
    """One attempt at a node, from its start to its statement."""

    def __init__(self, task: Task, store: Store, report: FileReport, ranks: Ranks) -> None:
        self.task, self.store, self.report, self.ranks = task, store, report, ranks
        self.stage = registry.stage(task.stage)
        self.config = self.stage.config.model_validate(task.config)
        self.materials: dict[str, Artifact] = {}
        self.started, self.usage_at_start = time.time(), Usage.now()
        self.code = code_digests(registry.stages()[task.stage], self.stage.code(self.config))
        self.operations = [operation(self.config)]
        """The distinct operational configs of this attempt and of those that it resumed, the latest last."""
        self.starts: StartRecords | None = None
        """Of a stage that trains; the worker sets it."""

    def record(self, artifact: Artifact, part: Checkpoint | None = None) -> None:
        """Writes the statement of a product just before it is sealed. Raises AtomError if it must not be sealed.

        part: the kind of the product, if it is not the stage's own artifact.
        """
        self.refuse_second_digest(artifact)
        self._write_statement({artifact.key: artifact.digest}, "sealed", part, None if part else artifact)

    def record_failure(self, failure: Failure) -> None:
        """Writes the statement of a failed attempt; its subject is the events of the attempt."""
        name = f"{self.task.run}/{self.task.node}/events.jsonl"
        published = Failure(strip_paths(failure.text, self.store.home), failure.kind)
        try:
            self._write_statement({name: sha256_file(self.store.logs / name)}, published)
        except OSError as error:  # a full disk: the failure itself is reported all the same
            print(f"{self.task.node}: no statement of this attempt: {error}", file=sys.stderr, flush=True)

    def refuse_second_digest(self, artifact: Artifact) -> None:
        """Refuses a digest of a bitwise stage that differs from an earlier one with the same inputs, code, environment
        and operational config. (Another layout of ranks adds in another order.)"""
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
        if product is not None:  # usage of the tasks of a job array
            shards = self.store.logs / self.task.run / self.task.node / "shards"
            usages += [
                process_usage
                for path in sorted(shards.glob("ranks/*/usage.json"))
                if (process_usage := _read_usage(path))
            ]
        finished, cpu = time.time(), sum(process_usage.cpu_seconds for process_usage in usages)
        watts, gpu_seconds = self.task.watts_per_core, (finished - self.started) * self.task.gpus
        gpus = {"gpus": self.task.gpus, "gpu_seconds": round(gpu_seconds, 3)} if self.task.gpus else {}
        if self.task.server_gpus:
            servers = self.store.logs / self.task.run / self.task.node / "servers"
            served = self.task.server_gpus * server_seconds(servers, self.started, finished)
            gpu_seconds += served
            gpus |= {"gpu_seconds": round(gpu_seconds, 3), "server_gpu_seconds": round(served, 3)}
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
            starts=None if part or self.starts is None else self.starts.read(),
            metrics=None if product is None else self.report.end_metrics(),
        )
        provenance.write(self.store.ledger, part.key if part else self.task.key, body)
        if part is None:
            self.report.event("usage", **usage)
