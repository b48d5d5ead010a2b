"""One attempt at a node, with its parameters, its records and the checkpoints that it seals before its end.

    work/<key>/starts.json               every start of a stage that trains: time, commit, dirty, prediction
    work/<key>/state/starts/0002.json    further facts by the stage: restored step, device, comparison with the log

Both are for the statement of the stage, and name a start by the number of its lease. A killed start writes no
statement, but stays in the next one's.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, environment, extensions, json_files, provenance
from pipeline.core.errors import AtomError, Failure, MachineError
from pipeline.core.events import FileReport
from pipeline.core.extensions import Installed
from pipeline.core.lease import Lease, draft_folder
from pipeline.core.provenance import Start
from pipeline.core.source_code import code_digests
from pipeline.core.stage import Stage, identity, operation
from pipeline.core.store import Artifact, Store, digest_of, rows_of, sha256_file
from pipeline.graph import registry
from pipeline.graph.dag import Checkpoint, Graph, Node
from pipeline.graph.run import Run
from pipeline.launch.diagnoses import strip_paths
from pipeline.launch.rendezvous import FAILED_USAGE_SECONDS, USAGE_SECONDS, Ranks, Usage

RECORDS: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[dict[str, Any]])
RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
# The consequence of a damaged record.
NOT_STATED = "what it says of earlier starts is not stated"
# The name of a prediction's key; the rest is that of the predicted stage's key.
PREDICTION = "prediction"


def prediction_key(key: str) -> str:
    """Returns the key of the prediction of a stage's product."""
    return f"{PREDICTION}-{key.rpartition('-')[2]}"


class StartRecords:
    """The starts of a stage that trains.

    Args:
        folder: The folder of the work at a key.
        number: The number of this start's lease.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / "starts.json"

    def add(self, store: Store, key: str, started: float) -> None:
        """Adds this start. Its prediction is the digest of the one that is sealed at this moment, None without one."""
        commit, dirty = environment.git_commit(environment.code_root())
        predicted = prediction_key(key)
        record: Start = {
            "start": self.number,
            "startedOn": provenance.clock(started),
            "commit": commit,
            "dirty": dirty,
            "prediction": store.manifest(predicted).digest if store.sealed(predicted) else None,
        }
        atomic_files.write(self.path, json.dumps([*self._read(), record]))

    def read(self) -> list[Start]:
        """Returns all starts at the key, each with what its stage added."""
        return [cast(Start, {**record, **self._of_stage(record)}) for record in self._read()]

    def _read(self) -> list[Start]:
        return json_files.read_optional(self.path, RECORDS, NOT_STATED) or []

    def _of_stage(self, record: Start) -> dict[str, Any]:
        path = self.folder / "state/starts" / f"{record.get('start', 0):04d}.json"
        return json_files.read_optional(path, RECORD, NOT_STATED) or {}


class _UsageFile(TypedDict):
    cpu_seconds: float
    peak_memory_bytes: int


USAGE: TypeAdapter[Any] = TypeAdapter(_UsageFile)


class AttemptUsage(TypedDict):
    """The usage of an attempt, in its statement and its last events."""

    wall_seconds: float
    """duration"""
    cpu_seconds: float
    """CPU time of all ranks and their children"""
    gpus: NotRequired[int]
    """allotted GPUs, if any"""
    gpu_seconds: NotRequired[float]
    """seconds of allotted GPUs and of those of its servers"""
    server_gpu_seconds: NotRequired[float]
    """GPU seconds that its servers in separate jobs were asked for while this attempt ran, if these have GPUs"""
    peak_memory_bytes: int
    """memory of the largest rank"""
    ranks: int
    """processes that ran the stage"""
    ranks_counted: int
    """ranks that `cpu_seconds` and `peak_memory_bytes` cover; a killed rank cannot report its usage"""
    energy_joules_estimate: float
    """an estimate, not a measurement"""
    energy_method: str
    """how it is computed: CPU seconds times the profile's watts a core, and similarly for GPUs"""
    figures: dict[str, float]
    """the last figures of the stage's progress"""


@dataclass(frozen=True)
class Task:
    """The parameters of a job as plain values, so that its pickle is small."""

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
    server_gpus: int = 0  # of all of its servers in jobs of their own
    planned_tokens_per_s: float = 0.0  # 0: not planned
    extensions: Installed = field(default_factory=Installed)

    def load_stage(self) -> Stage:
        """Returns the stage of the node, with the extensions of the recipe installed. Raises RecipeError."""
        extensions.install(self.extensions)
        return registry.stage(self.stage)

    @classmethod
    def of(cls, graph: Graph, store: Store, run: Run, node: Node, **resources: Any) -> Task:
        """Returns the parameters of a node's job in a run. `resources` are the fields that the launcher decides."""
        return cls(
            home=str(store.home),
            run=run.id,
            node=node.name,
            stage=node.stage.name,
            config=node.config.model_dump(mode="json"),
            inputs=graph.materials(node),
            key=node.key,
            extensions=graph.recipe.extensions,
            **resources,
        )


class Attempt:
    """One attempt at a node, from its start to its statement."""

    def __init__(self, task: Task, store: Store, report: FileReport, ranks: Ranks) -> None:
        self.task, self.store, self.report, self.ranks = task, store, report, ranks
        self.stage = task.load_stage()
        self.config = self.stage.config.model_validate(task.config)
        self.materials: dict[str, Artifact] = {}
        self.started, self.usage_at_start = time.time(), Usage.now()
        self.code = code_digests(registry.stages()[task.stage], self.stage.code(self.config))
        # The distinct operational configs of this attempt and of those that it resumed, the latest last.
        self.operations = [operation(self.config)]
        # Of a stage that trains; the worker sets it.
        self.starts: StartRecords | None = None

    def record(self, artifact: Artifact, part: Checkpoint | None = None) -> None:
        """Writes the statement of a product just before it is sealed.

        Args:
            artifact: The product.
            part: The kind of the product, if it is not the stage's own artifact.

        Raises:
            AtomError: It must not be sealed.
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
        """Raises AtomError if a bitwise stage made other bytes than in an earlier attempt under the same conditions.

        The conditions are inputs, code, environment and operational config. The last one counts because another layout
        of ranks adds in another order.
        """
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
        failed = isinstance(outcome, Failure) and not outcome.kind.orderly
        timeout = FAILED_USAGE_SECONDS if failed else USAGE_SECONDS
        # A checkpoint is sealed while the other ranks go on, so their usage is not known yet.
        usages = [Usage.now().since(self.usage_at_start), *([] if part else self.ranks.peer_usages(timeout))]
        if product is not None:  # usage of the tasks of a job array
            shards = self.store.logs / self.task.run / self.task.node / "shards"
            for path in sorted(shards.glob("ranks/*/usage.json")):
                if record := json_files.read_optional(path, USAGE, "what that task used is not counted"):
                    usages.append(Usage(**record))
        finished, cpu = time.time(), sum(process_usage.cpu_seconds for process_usage in usages)
        watts, gpu_seconds = self.task.watts_per_core, (finished - self.started) * self.task.gpus
        gpus = {"gpus": self.task.gpus, "gpu_seconds": round(gpu_seconds, 3)} if self.task.gpus else {}
        if self.task.server_gpus:
            served = self.task.server_gpus * (finished - self.started)
            gpu_seconds += served
            gpus |= {"gpu_seconds": round(gpu_seconds, 3), "server_gpu_seconds": round(served, 3)}
        board = f", and allotted GPU seconds x {self.task.watts_per_gpu} W per GPU" if gpus else ""
        usage: AttemptUsage = {
            "wall_seconds": round(finished - self.started, 3),
            "cpu_seconds": round(cpu, 3),
            **gpus,  # type: ignore[typeddict-item]
            "peak_memory_bytes": max(process_usage.peak_memory_bytes for process_usage in usages),
            "ranks": self.task.ranks,
            "ranks_counted": len(usages),
            "energy_joules_estimate": round(cpu * watts + gpu_seconds * self.task.watts_per_gpu, 1),
            "energy_method": f"estimate: CPU seconds of all ranks x {watts} W per busy core{board}, from the cluster "
            "profile; not measured; cooling and idle power are left out",
            "figures": dict(self.report.figures),
        }
        record = provenance.AttemptRecord(
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
        provenance.write(self.store.ledger, record.key, provenance.statement(record))
        if part is None:
            self.report.event("usage", **usage)


class CheckpointArtifacts:
    """Seals the release checkpoints of one attempt, which holds the lease of its key. Any of its threads may seal one.

    The artifact of the phase has the same files (the same inodes, by hard links), but only after the end of the phase.
    A checkpoint can be used while its phase is running, or if the phase never ends.
    """

    def __init__(self, attempt: Attempt, lease: Lease) -> None:
        self.attempt, self.lease, self.lock = attempt, lease, threading.Lock()

    def seal(self, step: int, folder: Path) -> None:
        """Seals `folder` as the checkpoint after `step`, unless that was done before.

        Raises AtomError if it was sealed with different bytes by the same code in the same environment, MachineError if
        another worker has taken over.
        """
        with self.lock:
            task, store = self.attempt.task, self.attempt.store
            checkpoint = Checkpoint(task.key, step)
            self._require_lease(checkpoint)
            if store.sealed(checkpoint.key):
                self._check_same_digest(store.open(checkpoint.key), folder)
                return
            draft = draft_folder(store.work(task.key), self.lease.number, step)
            try:
                # By hard links, so that a checkpoint takes no time to copy and no further space.
                shutil.copytree(folder, draft, copy_function=os.link)
                store.seal(draft, checkpoint.key, lambda artifact: self._record(artifact, checkpoint))
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def _record(self, artifact: Artifact, checkpoint: Checkpoint) -> None:
        # Once more just before the rename, because another worker may have taken over while the files were hashed.
        self._require_lease(checkpoint)
        self.attempt.record(artifact, checkpoint)

    def _check_same_digest(self, sealed: Artifact, folder: Path) -> None:
        pairs = [(sealed / row.path, folder / row.path) for row in sealed.rows]
        if all(new.exists() and os.path.samefile(old, new) for old, new in pairs):
            return  # same files by hard links: nothing to compare
        rows = rows_of(folder, handed_over=True)
        artifact = Artifact(sealed.key, digest_of(rows), folder, tuple(rows))
        self.attempt.refuse_second_digest(artifact)
        if artifact.digest != sealed.digest:
            self.attempt.report.note(
                f"{artifact.key} came out as {artifact.digest[:12]}; {sealed.digest[:12]} stands, made by other code, "
                "in another environment or by other ranks"
            )

    def _require_lease(self, checkpoint: Checkpoint) -> None:
        if self.lease.lost:
            raise MachineError(f"another worker took over {checkpoint.phase} before {checkpoint.node} was sealed here")
