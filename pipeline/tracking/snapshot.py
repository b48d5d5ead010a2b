"""A run at one moment: its stages with curves, and its hours and money against the budget."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.core import json_files
from pipeline.core.json_files import Damaged
from pipeline.core.log_summary import Curves, EventSummary
from pipeline.core.progress import duration, human
from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph.budget import RESOURCES, Hours, Limits, Resource
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch.slurm_client import Answers
from pipeline.tracking import status

# The first curves to show, in this order.
_CURVES = """
loss heldout_loss reward step_tokens_per_s tokens_per_s step_seconds grad_norm peak_gpu_memory_bytes peak_memory_bytes
spike dead_experts expert_max_violation router_entropy data_wait_seconds checkpoint_stall_seconds lr
"""
CURVES = tuple(_CURVES.split())
NO_CHARTS = ("tokens", "spike")


@dataclass(frozen=True)
class StageView:
    """A stage with its logs."""

    status: NodeStatus
    # None if it has recorded none.
    curves: Curves | None

    @property
    def events(self) -> EventSummary:
        """The summary of its events, as it was when its status was read."""
        assert self.status.events is not None, "the status of a node of a run has them"
        return self.status.events

    @property
    def gpus(self) -> int:
        start = self.events.state["start"]
        return start.get("gpus", 0) if start else 0

    def names(self) -> list[str]:
        """Returns the names of its curves, the best known ones first."""
        names = [] if self.curves is None else list(self.curves.state["curves"])
        known = [name for name in CURVES if name in names]
        return [name for name in [*known, *sorted(set(names) - set(known))] if name not in NO_CHARTS]

    def counts(self) -> list[str]:
        """Returns the numbers of restarts, spikes and dead experts, in words."""
        counts = {
            "restart": self.status.restarts or 0,
            "loss spike": self.curves.count("spike") if self.curves else 0,
            "dead expert": int((self.curves.last("dead_experts") if self.curves else 0) or 0),
        }
        return [f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count]


@dataclass(frozen=True)
class Spending:
    """Hours of a run."""

    # Hours of ended attempts.
    used: Hours
    # Hours of the present attempts so far, where a rank without GPUs counts as one busy core.
    running: Hours
    # Hours that the running stages still need at their pace.
    coming: Hours
    limits: Limits | None
    # Stages that have not begun.
    waiting: int

    def now(self, name: Resource) -> float:
        return self.used[name] + self.running[name]

    def expected(self, name: Resource) -> float:
        """Returns the use that is expected at the end of the running stages."""
        return self.now(name) + self.coming[name]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: Run
    time: float
    stages: tuple[StageView, ...]
    # A sentence on missing information.
    lack: str | None
    spending: Spending

    @property
    def over(self) -> bool:
        return status.over([stage.status for stage in self.stages])

    def shown(self) -> list[StageView]:
        """Returns the stages whose curves are of interest: running ones first, then the latest of the others."""
        with_curves = [stage for stage in self.stages if stage.curves is not None and stage.names()]
        return sorted(reversed(with_curves), key=lambda stage: stage.status.state != "running")

    def spending_text(self) -> list[str]:
        """Returns lines on the hours and the money, used and expected, beside the budget."""
        prices, lines = self.run.body.get("prices"), []
        total = budget.hours(self.spending.now)
        expected = budget.hours(self.spending.expected)
        lines.append(f"used so far: {budget.describe(total, prices)}")
        lines.append(f"expected when the running stages end: {budget.describe(expected, prices)}")
        for name in RESOURCES:
            if self.spending.limits and (limit := self.spending.limits.get(name)):
                share, coming = total[name] / limit, expected[name] / limit
                lines.append(f"budget.{name} = {limit:,.10g}: {share:.0%} used, {coming:.0%} expected")
        if self.spending.waiting:
            lines.append(f"not in what is expected: {self.spending.waiting} stages that have not begun")
        return lines


def take(run: Run, store: Store, answers: Answers | None = None) -> Snapshot:
    """Reads the files of a run, and asks Slurm for its jobs if it has any. Writes nothing.

    `answers` are the answers of Slurm, which a loop keeps.
    """
    nodes, lack = status.status(run, store, answers)
    stages = []
    for node in nodes:
        folder = run.node_folder(node.name)
        curves = Curves(folder) if (folder / "metrics.jsonl").exists() else None
        stages.append(StageView(node, curves))
    now = time.time()
    return Snapshot(run, now, tuple(stages), lack, _spending(run, store, stages, now))


def _spending(run: Run, store: Store, stages: Iterable[StageView], now: float) -> Spending:
    used, running, coming = (budget.hours(lambda name: 0.0) for _ in range(3))
    waiting = 0
    for stage in stages:
        ended = used_hours(store, stage.status.key)
        for resource in RESOURCES:
            used[resource] += ended[resource]
        start = stage.events.state["start"]
        if stage.status.state == "running" and start:
            name: Resource = "gpu_hours" if stage.gpus else "core_hours"
            places = stage.gpus or start["ranks"]
            running[name] += max(0.0, now - start["time"]) * places / 3600
            coming[name] += (stage.status.eta or 0.0) * places / 3600
        waiting += stage.status.state not in ("sealed", "running")
    limits = run.body.get("budget")
    return Spending(used, running, coming, limits, waiting)


def used_hours(store: Store, key: str) -> Hours:
    """Returns the use of all ended attempts at a key; statements that this process has read are not read again."""
    try:
        return _hours(store.home, key, tuple(json_files.names(store.ledger / key)))
    except Damaged:
        return budget.used(store, [key])  # which reports it


# A statement never changes, so the names of statements stand for their content.
@lru_cache(maxsize=10_000)
def _hours(home: Path, key: str, names: tuple[str, ...]) -> Hours:
    return budget.used(Store(home), [key])


def sparkline(values: list[float], width: int = 48) -> str:
    """Returns the last values as one line of blocks."""
    values = values[-width:]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((value - low) / (high - low or 1) * 8))] for value in values)


def lines(snapshot: Snapshot) -> list[str]:
    """Returns the lines that `atom status --watch` shows below its table."""
    text = []
    for stage in snapshot.shown()[:2]:
        assert stage.curves is not None
        text.append("  ".join([f"{stage.status.name}:", *stage.counts()]))
        for name in stage.names()[:8]:
            values = [mean for _, mean, _, _ in stage.curves.points(name)]
            text.append(f"  {name[:24]:<24} {human(values[-1]):>8}  {sparkline(values)}")
        for event in stage.events.state["notes"][-3:]:
            text.append(f"  {duration(max(0.0, snapshot.time - event['time']))} ago: {event['text'][:200]}")
    return text + snapshot.spending_text() + ([snapshot.lack] if snapshot.lack else [])
