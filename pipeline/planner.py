"""What a run will ask of a machine, from each stage's own estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.graph import Graph, State
from pipeline.stage import Estimate


@dataclass(frozen=True)
class Row:
    """One stage of the plan: its state and its estimate."""

    state: State
    estimate: Estimate

    def json(self) -> dict[str, Any]:
        e = self.estimate
        return {
            "name": self.state.name,
            "key": self.state.key,
            "state": self.state.text,
            "changed_code": list(self.state.changed),
            "cpu_seconds": e.cpu_seconds,
            "tokens": e.tokens,
            "flops": e.flops,
            "memory_bytes": e.memory_bytes,
            "disk_bytes": e.disk_bytes,
            "parameters": e.parameters,
        }


def plan(graph: Graph, states: dict[str, State], selected: list[str]) -> list[Row]:
    return [Row(states[name], graph.nodes[name].stage.estimate(graph.nodes[name].config)) for name in selected]
