"""The plan of a run: each stage with its state and its own estimate, and the times of checkpoints.

A watchdog ends an attempt in which no rank makes progress for so many seconds. While checkpoints are written or hashed,
progress is reported after every piece of work. So the limit need not be longer than a seal: it must be longer than the
largest piece takes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Accelerator, Estimate, Needs, RankSimulation, TrainingTime, operation
from pipeline.graph.dag import Graph, State

# The fields of an estimate that the JSON of a plan has as they are.
ESTIMATES = (
    "cpu_seconds serial_seconds gpu_seconds tokens flops memory_bytes host_bytes disk_bytes work_bytes files "
    "published_bytes"
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan."""

    state: State
    estimate: Estimate
    # Input artifacts from earlier runs, by role.
    external: Mapping[str, str]
    ranks: int
    # The operational fields of its config.
    operation: Mapping[str, Any]
    obstacle: str | None = None
    trains: bool = False
    # Which tasks of a job array may process.
    shards: int = 1
    # The time of a training phase on GPUs, if there is a model of it.
    time: Callable[[Accelerator], TrainingTime] | None = None
    # Servers in jobs of their own can work for it.
    takes_servers: bool = False
    # GPUs of a rank that does not train.
    gpus: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(self.ranks, self.gpus, self.trains)

    def json(self) -> dict[str, Any]:
        e = self.estimate
        return {
            "name": self.state.name,
            "key": self.state.key,
            "state": self.state.text,
            "changed_code": list(self.state.changed),
            **{name: getattr(e, name) for name in ESTIMATES.split()},
            "published": [asdict(files) for files in e.published],
            "parameters": e.parameters,
            "training": asdict(e.training) if e.training else None,
            "external": dict(self.external),
            "ranks": self.ranks,
            "gpus": self.gpus,
            "shards": self.shards,
            "operation": dict(self.operation),
            "obstacle": self.obstacle,
            "damage": self.state.damage,
        }


def timed(estimates: Iterable[Estimate]) -> bool:
    """Returns True if every training phase has an estimate of CPU time: that of fp32 on CPU, for small phases."""
    return all(estimate.cpu_seconds is not None for estimate in estimates if estimate.training)


def is_small(graph: Graph) -> bool:
    """Returns True if the corpora of a recipe are all small.

    They are small if they are no larger than those with which the fixed estimates of stages were measured.
    """
    return timed(node.stage.estimate(node.config) for node in graph.nodes.values())


def plan(graph: Graph, states: dict[str, State], selected: list[str], other_python: bool = False) -> list[StagePlan]:
    """Returns the plan of the selected stages.

    Args:
        graph: The graph of the recipe.
        states: The state of each stage, by its name.
        selected: The names of the stages, in order.
        other_python: They run with another Python than this process, so that nothing follows from what this machine
            lacks.
    """
    return [
        StagePlan(
            states[node.name],
            node.stage.estimate(node.config),
            node.external,
            node.stage.ranks(node.config),
            operation(node.config),
            node.stage.obstacle(node.config) or (None if other_python else node.stage.lack(node.config)),
            node.stage.trains,
            node.stage.shards(node.config),
            partial(node.stage.time, node.config) if node.stage.time else None,
            node.stage.takes_servers(node.config),
            node.stage.gpus(node.config),
        )
        for node in (graph.nodes[name] for name in selected)
    ]


def simulations(graph: Graph, rows: list[StagePlan], rank: int) -> dict[str, RankSimulation]:
    """Returns a rank of each training phase of a plan, simulated, by stage. Raises AtomError if none can be."""
    results = {}
    for node in (graph.nodes[row.state.name] for row in rows):
        if node.stage.simulate is not None:
            print(f"simulating rank {rank} of {node.name}", file=sys.stderr, flush=True)
            results[node.name] = node.stage.simulate(node.config, rank)
    if not results:
        raise AtomError("no stage of this plan can be simulated; choose a training phase with --only")
    return results


def remarks(rows: list[StagePlan]) -> list[str]:
    """Returns remarks on a plan, each as one sentence.

    They name the checkpoints that stages continue from, damaged and stale stages, and stages that this machine cannot
    run.
    """
    sentences, obstacles = [], dict[str, list[str]]()
    for row in rows:
        name = row.state.name
        for key in row.external.values() if row.trains else ():
            sentences.append(f"{name} continues from {key.rsplit('-', 1)[0]} (key {key})")
        if row.state.damage:
            sentences.append(f"{name}: {row.state.damage}")
        if row.obstacle:
            obstacles.setdefault(row.obstacle, []).append(name)
        if row.state.changed:
            sentences.append(f"{name} was sealed by other code than today's: {', '.join(row.state.changed)} changed")
    return sentences + [f"{', '.join(names)} cannot be run here: {text}" for text, names in obstacles.items()]


# Bytes/s at which a rank reads, hashes and writes its share of a release checkpoint, with one thread. Measured by
# bench/seal.py.
SEAL_RATE = 0.4e9
# Bytes/s at which one thread hashes a file. Measured by bench/seal.py.
HASH_RATE = 1.2e9
GB = 10**9


@dataclass(frozen=True)
class CheckpointTimes:
    """Seconds for one release checkpoint of a phase.

    Attributes:
        seal: For all ranks to write it.
        verify: For all ranks to hash it.
        silent: At most, from one report of progress to the next.
        watchdog: Without progress after which the phase's watchdog ends an attempt.
    """

    seal: float
    verify: float
    silent: float
    watchdog: float


def checkpoint_times(row: StagePlan, storage_gb_s: float | None) -> CheckpointTimes | None:
    """Returns the times of a phase; None for a stage that does not train.

    Args:
        row: The plan of the stage.
        storage_gb_s: GB/s that the storage reads and writes for all ranks together; None: as much as they ask for.
    """
    training = row.estimate.training
    if training is None:
        return None
    storage = math.inf if storage_gb_s is None else storage_gb_s * GB
    return CheckpointTimes(
        seal=max(training.share_bytes / SEAL_RATE, 2 * training.checkpoint_bytes / storage),  # read, and written
        verify=max(training.share_bytes / HASH_RATE, training.checkpoint_bytes / storage),
        # All ranks may write such a piece at the same time, and they share the storage.
        silent=max(training.silent_bytes / SEAL_RATE, row.ranks * training.silent_bytes / storage),
        watchdog=training.watchdog_seconds,
    )


def checkpoint_sentences(rows: Iterable[StagePlan], storage_gb_s: float | None) -> list[str]:
    """Returns a sentence for the phases with equal times, and one on what they rest on; none without a phase."""
    phases: dict[str, list[str]] = {}
    for row in rows:
        if (times := checkpoint_times(row, storage_gb_s)) is not None:
            figures = (
                f"sealed in {_seconds(times.seal)}, verified in {_seconds(times.verify)}, at most "
                f"{_seconds(times.silent)} without a sign of progress (watchdog_timeout_seconds: {times.watchdog:g})"
            )
            phases.setdefault(figures, []).append(row.state.name)
    if not phases:
        return []
    storage = f"storage.gb_s = {storage_gb_s:g} for all ranks" if storage_gb_s else "no limit of storage.gb_s"
    speed = f"{SEAL_RATE / GB:g} and {HASH_RATE / GB:g} GB/s a rank, as measured on one core, and {storage}"
    return [f"checkpoint of {', '.join(names)}: {text}" for text, names in phases.items()] + [f"assumed: {speed}"]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def require_patient_watchdogs(rows: Iterable[StagePlan], storage_gb_s: float | None) -> None:
    """Raises RecipeError for a phase to be run whose watchdog would take sealing for a hang.

    Args:
        rows: The plans of the stages.
        storage_gb_s: As for `checkpoint_times`.
    """
    for row in rows:
        times = checkpoint_times(row, storage_gb_s) if row.state.text == "to run" else None
        if times is not None and times.silent > times.watchdog:
            speed = f", with storage.gb_s = {storage_gb_s:g} for all ranks together" if storage_gb_s else ""
            raise RecipeError(
                f"stage {row.state.name}: while a checkpoint is sealed{speed}, no rank may report progress for "
                f"{math.ceil(times.silent):,} s, and watchdog_timeout_seconds = {times.watchdog:g} would end each "
                f"attempt; set it to {math.ceil(times.silent):,} or more"
            )
