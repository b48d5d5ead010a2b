"""The plan of a run: each stage with its state and its own estimate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.core.errors import AtomError
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


@dataclass(frozen=True)
class PlannedGate:
    """A gate on the effect of training, and the phase after which it is judged."""

    name: str
    # What it compares, in words.
    compares: str
    # The phase whose effect it judges.
    phase: str
    # The stage that judges it, or the command.
    judged_by: str
    # The reason for which the recipe waives it; None if it does not.
    waived: str | None


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
