"""The plan of a run: each stage with its state and its own estimate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.stage import Accelerator, Estimate, LongContext, Needs, RankSimulation, TrainingTime, operation
from pipeline.graph.dag import Graph, State


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan: its state, its estimate, its input artifacts from earlier runs by role, its ranks, the
    operational fields of its config, and its shards, which tasks of a job array may process. time: of a training phase
    on GPUs, where there is a model of it. takes_servers: whether servers in jobs of their own can work for it. gpus: of
    a rank that does not train."""

    state: State
    estimate: Estimate
    external: Mapping[str, str]
    ranks: int
    operation: Mapping[str, Any]
    obstacle: str | None = None
    trains: bool = False
    shards: int = 1
    time: Callable[[Accelerator], TrainingTime] | None = None
    takes_servers: bool = False
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
            "cpu_seconds": e.cpu_seconds,
            "serial_seconds": e.serial_seconds,
            "gpu_seconds": e.gpu_seconds,
            "tokens": e.tokens,
            "flops": e.flops,
            "memory_bytes": e.memory_bytes,
            "host_bytes": e.host_bytes,
            "disk_bytes": e.disk_bytes,
            "work_bytes": e.work_bytes,
            "files": e.files,
            "published_bytes": e.published_bytes,
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
    """Returns True if all corpora of a recipe are as small as those that the fixed estimates of stages were measured
    with."""
    return timed(node.stage.estimate(node.config) for node in graph.nodes.values())


def plan(graph: Graph, states: dict[str, State], selected: list[str], other_python: bool = False) -> list[StagePlan]:
    """The plan of the selected stages. other_python: they run with another Python than this process, so that nothing
    follows from what this machine lacks."""
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
    """A rank of each training phase of a plan, simulated, by stage. Raises AtomError if none can be."""
    results = {}
    for node in (graph.nodes[row.state.name] for row in rows):
        if node.stage.simulate is not None:
            print(f"simulating rank {rank} of {node.name}", file=sys.stderr, flush=True)
            results[node.name] = node.stage.simulate(node.config, rank)
    if not results:
        raise AtomError("no stage of this plan can be simulated; choose a training phase with --only")
    return results


def long_context(rows: list[StagePlan]) -> LongContext | None:
    """The cost of a long text to the model of a plan; None if the plan trains none."""
    return next((row.estimate.long_context for row in rows if row.estimate.long_context), None)


def remarks(rows: list[StagePlan]) -> list[str]:
    """Sentences on the checkpoints that a plan's stages continue from, on damaged and stale stages, and on those that
    this machine cannot run."""
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
