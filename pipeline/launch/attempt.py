"""An attempt at a node: what it is asked for, what it states about its product, and which product it refuses."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
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
from pipeline.launch.failure_messages import without_places
from pipeline.launch.rendezvous import FAILED_USAGE_SECONDS, USAGE_SECONDS, Ranks, Usage


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


class Attempt:
    """One try at a node, from its start to the statement about it."""

    def __init__(self, task: Task, store: Store, report: FileReport, ranks: Ranks) -> None:
        self.task, self.store, self.report, self.ranks = task, store, report, ranks
        self.stage = registry.stage(task.stage)
        self.config = self.stage.config.model_validate(task.config)
        self.materials: dict[str, Artifact] = {}
        self.started, self.before = time.time(), Usage.now()
        self.code = code_digests(registry.STAGES[task.stage])
        self.operations = [operation(self.config)]
        """How this attempt and those whose work it goes on from were run: each way once, the latest last."""

    def record(self, made: Artifact, part: Checkpoint | None = None) -> None:
        """The statement of a product, written just before it is sealed. Raises AtomError if it must not be.

        part: what the product is, if it is not the stage's own.
        """
        self.refuse_second_digest(made)
        self._state({made.key: made.digest}, "sealed", part, None if part else made)

    def record_failure(self, failure: Failure) -> None:
        """The statement of a failed attempt; its subject is the attempt's events, which are what is left of it."""
        name = f"{self.task.run}/{self.task.node}/events.jsonl"
        published = Failure(without_places(failure.text, self.store.home), failure.kind)
        try:
            self._state({name: sha256_file(self.store.logs / name)}, published)
        except OSError as error:  # a full disk: the failure itself is told all the same
            print(f"{self.task.node}: no statement of this attempt: {error}", file=sys.stderr, flush=True)

    def refuse_second_digest(self, made: Artifact) -> None:
        """A bitwise stage must give the digest that it gave before from these inputs with this code, here and run in
        the same way: another layout of ranks adds in another order."""
        if self.stage.promise(self.config) != "bitwise" or environment.device()["type"] != "cpu":
            return  # GPU kernels add in an order of their own
        here = environment.fingerprint()
        for _, body in provenance.read(self.store.ledger, made.key):
            before = {s["name"]: s["digest"]["sha256"] for s in body["subject"]}.get(made.key)
            materials = {role: a.digest for role, a in self.materials.items()}
            same = provenance.environment_of(body)["fingerprint"] == here and provenance.code_of(body) == self.code
            same = same and provenance.materials_of(body) == materials
            same = same and provenance.operations_of(body) == self.operations
            if before not in (None, made.digest) and same:
                raise AtomError(
                    f"{made.key} came out as {made.digest[:12]} but as {before[:12]} before, with the same code in the "
                    "same environment, so it is not reproducible; look for a seed, a clock or threads in the stage"
                )

    def _state(
        self,
        subject: dict[str, str],
        outcome: str | Failure,
        part: Checkpoint | None = None,
        product: Artifact | None = None,
    ) -> None:
        hasty = isinstance(outcome, Failure) and outcome.kind is not Kind.STOPPED
        patience = FAILED_USAGE_SECONDS if hasty else USAGE_SECONDS
        counted = [Usage.now().since(self.before), *([] if part else self.ranks.others(patience))]
        if product is not None:  # what tasks of a job array did beforehand
            shards = self.store.logs / self.task.run / self.task.node / "shards"
            counted += [used for path in sorted(shards.glob("ranks/*/usage.json")) if (used := _usage(path))]
        finished, cpu = time.time(), sum(used.cpu_seconds for used in counted)
        watts, gpu = self.task.watts_per_core, (finished - self.started) * self.task.gpus
        gpus = {"gpus": self.task.gpus, "gpu_seconds": round(gpu, 3)} if self.task.gpus else {}
        board = f", and allotted GPU seconds x {self.task.watts_per_gpu} W per GPU" if gpus else ""
        usage = {
            "wall_seconds": round(finished - self.started, 3),
            "cpu_seconds": round(cpu, 3),
            **gpus,
            "peak_memory_bytes": max(used.peak_memory_bytes for used in counted),
            "ranks": self.task.ranks,
            "ranks_counted": len(counted),
            "energy_joules_estimate": round(cpu * watts + gpu * self.task.watts_per_gpu, 1),
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
            of={"key": part.phase, "step": part.step} if part else None,
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


def _usage(path: Path) -> Usage | None:
    """What a task of a job array wrote down that it used; None, with a report, if that cannot be read."""
    try:
        return Usage(**json_files.read(path, USAGE))
    except Damaged as error:
        json_files.report(error, "what that task used is not counted")
        return None
