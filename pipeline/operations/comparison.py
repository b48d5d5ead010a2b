"""Compares two recipes, or several runs.

Recipes are compared by settings, keys and the cost of what would run again. Runs are compared by settings, metrics,
scores and costs, from their files alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core import json_files, provenance
from pipeline.core.log_summary import Curves
from pipeline.core.provenance import Statement
from pipeline.core.stage import identity
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph.dag import Graph, Node
from pipeline.graph.flat_fields import flat, scores_of, settings_of
from pipeline.graph.plan import is_small, plan
from pipeline.graph.run import NodeRow, Run
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.fit import CostEstimate, estimate_costs

# In the place of a value that one of two recipes does not have.
ABSENT = "absent"


@dataclass(frozen=True)
class FieldChange:
    """A setting that differs."""

    field: str
    before: Any
    after: Any
    operational: bool  # it is in no key


@dataclass(frozen=True)
class StageChange:
    """A stage of the second recipe whose key is not that of the first."""

    name: str
    # The key in the first recipe; None if it has no such stage.
    before: str | None
    key: str
    state: str
    # The settings that differ, and the inputs with other keys.
    settings: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def because(self) -> str:
        if self.before is None:
            return "new"
        return ", ".join([*self.settings, *(f"input {name}" for name in self.inputs)])


@dataclass(frozen=True)
class Difference:
    """The difference of two recipes, with states and costs in this home."""

    fields: tuple[FieldChange, ...]
    stages: tuple[StageChange, ...]
    removed: tuple[str, ...]
    unchanged: int
    # The cost of the changed stages that are not sealed.
    costs: CostEstimate

    def json(self) -> dict[str, Any]:
        return {
            "fields": [asdict(change) for change in self.fields],
            "stages": [{**asdict(change), "because": change.because} for change in self.stages],
            "removed": list(self.removed),
            "unchanged": self.unchanged,
            "cost": self.costs.json(),
        }


def compare(first: Graph, second: Graph, store: Store, profile: Profile) -> Difference:
    """Returns the difference of two graphs, with states and costs of the second one's stages in this home.

    Raises RecipeError if the ranks of a stage do not fill the profile's nodes equally.
    """
    states = dag.states(second, store)
    changes = tuple(
        _stage_change(first, second, node, states[name].text)
        for name, node in second.nodes.items()
        if name not in first.nodes or first.nodes[name].key != node.key
    )
    names = [change.name for change in changes]
    unchanged = [name for name in second.nodes if name not in names]
    return Difference(
        fields=tuple(field_changes(_settings(first), _settings(second))),
        stages=changes,
        removed=tuple(name for name in first.nodes if name not in second.nodes),
        unchanged=len(unchanged),
        costs=estimate_costs(plan(second, states, names), profile, is_small(second)),
    )


def field_changes(
    before: Mapping[str, tuple[Any, bool]], after: Mapping[str, tuple[Any, bool]]
) -> Iterator[FieldChange]:
    """Yields the fields of two flat mappings, to (value, operational), whose values differ.

    A section that only one has is stated by its fields, not as null in the other.
    """
    for field in dict.fromkeys([*before, *after]):
        (old, old_kind), (new, new_kind) = before.get(field, (ABSENT, True)), after.get(field, (ABSENT, True))
        if old != new and (old, new) not in ((None, ABSENT), (ABSENT, None)):
            yield FieldChange(field, old, new, old_kind and new_kind)


def _settings(graph: Graph) -> dict[str, tuple[Any, bool]]:
    """Returns the settings of a recipe and, below `data recipe`, of its data recipe.

    Name, version and description of a release are in no key.
    """
    fields = dict(flat(graph.recipe.config))
    fields |= {name: (fields[name][0], True) for name in ("name", "version", "description")}
    return fields | {f"data recipe: {name}": value for name, value in flat(graph.recipe.data)}


def _stage_change(first: Graph, second: Graph, node: Node, state: str) -> StageChange:
    if node.name not in first.nodes:
        return StageChange(node.name, None, node.key, state, (), ())
    old = first.nodes[node.name]
    old_fields, new_fields = (dict(flat(identity(each.config))) for each in (old, node))
    settings = [change.field for change in field_changes(old_fields, new_fields)]
    if (old.stage.name, old.stage.version) != (node.stage.name, node.stage.version):
        settings.append("stage")
    before, after = first.materials(old), second.materials(node)
    roles = [role for role in dict.fromkeys([*before, *after]) if before.get(role) != after.get(role)]
    inputs = [node.inputs.get(role, role) for role in roles]
    return StageChange(node.name, old.key, node.key, state, tuple(settings), tuple(dict.fromkeys(inputs)))


@dataclass(frozen=True)
class Cost:
    """Hours on the clock, of busy cores and of GPUs, money by the prices of the run's profile, and estimated energy."""

    wall_hours: float = 0.0
    core_hours: float = 0.0
    gpu_hours: float = 0.0
    energy_wh: float = 0.0
    attempts: int = 0
    money: float | None = None
    currency: str | None = None

    def json(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class Measured:
    """The settings, metrics, scores and costs of one run."""

    run: Run
    # The number of sealed stages.
    sealed: int
    # The keys by stage.
    keys: dict[str, str]
    # The settings of the recipe files that it began with, by field.
    settings: dict[str, Any]
    # The last value of each curve, by stage; of a long one, the mean of its last steps.
    metrics: dict[str, dict[str, float]]
    # The scores by stage.
    scores: dict[str, dict[str, float]]
    # The cost of all attempts at its stages, in whatever run.
    cost: Cost

    def json(self) -> dict[str, Any]:
        return {
            "run": self.run.id,
            "recipe": self.run.body["recipe"],
            "version": self.run.body["version"],
            "commit": self.run.body.get("commit"),
            "stages": len(self.keys),
            "sealed": self.sealed,
            "keys": self.keys,
            "settings": self.settings,
            "metrics": self.metrics,
            "scores": self.scores,
            "cost": self.cost.json(),
        }


def measure(run: Run, store: Store) -> Measured:
    """Reads the metrics, scores and costs of a run so far. A damaged file is reported and left out."""
    metrics, scores = {}, {}
    uses: list[dict[str, Any]] = []
    sealed = 0
    for node in run.body["nodes"]:
        statements = [body for _, body in provenance.read(store.ledger, node["key"])]
        uses += map(provenance.usage, statements)
        if store.sealed(node["key"]):
            sealed += 1
            with json_files.reporting("its scores are left out"):
                if numbers := scores_of(store.manifest(node["key"])):
                    scores[node["name"]] = numbers
        curves = Curves(_log_folder(run, store, node, statements))
        if curves.state["curves"]:
            metrics[node["name"]] = {name: curves.points(name)[-1][1] for name in curves.state["curves"]}
    return Measured(
        run,
        sealed,
        {node["name"]: node["key"] for node in run.body["nodes"]},
        settings_of(run),
        metrics,
        scores,
        _cost(uses, run.body.get("prices")),
    )


def differing_settings(rows: Sequence[Measured]) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ, with the value of each run."""
    fields = dict.fromkeys(field for row in rows for field in row.settings)
    values = {field: [row.settings.get(field, ABSENT) for row in rows] for field in fields}
    return {field: each for field, each in values.items() if any(value != each[0] for value in each)}


def _log_folder(run: Run, store: Store, node: NodeRow, statements: Sequence[Statement]) -> Path:
    """Returns the folder of logs of the attempt that sealed a stage, perhaps in another run; else that of this run."""
    here = run.node_folder(node["name"])
    if (here / "metrics.jsonl").exists():
        return here
    for body in reversed(statements):
        origin, stage = _invocation(body)
        if provenance.outcome(body) == "sealed" and origin:
            return store.logs / origin / stage
    return here


def _invocation(body: Statement) -> tuple[str, str]:
    """Returns the run and the stage of an attempt.

    Returns two empty texts if the statement does not name them as a place of logs.
    """
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w@.-]*)", provenance.invocation(body))
    return (match[1], match[2]) if match else ("", "")


def _cost(uses: Sequence[dict[str, Any]], prices: Any) -> Cost:
    def hours(field: str) -> float:
        return sum(float(use.get(field, 0.0)) for use in uses) / 3600

    core_hours, gpu_hours = hours("cpu_seconds"), hours("gpu_seconds")
    money = gpu_hours * prices["gpu_hour"] + core_hours * prices["core_hour"] if prices else None
    currency = prices["currency"] if prices else None
    energy_wh = hours("energy_joules_estimate")  # joules by 3,600
    return Cost(hours("wall_seconds"), core_hours, gpu_hours, energy_wh, len(uses), money, currency)
