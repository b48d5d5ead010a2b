"""Compares two recipes: which settings differ, which keys change, and what would run again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core import json_files, provenance
from pipeline.core.errors import AtomError
from pipeline.core.events import POINT, Point, Tail, curves_of
from pipeline.core.json_files import Damaged
from pipeline.core.provenance import Statement
from pipeline.core.stage import identity
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph.dag import Graph, Node
from pipeline.graph.flat_fields import flat, scores_of, settings_of
from pipeline.graph.plan import is_small, plan
from pipeline.graph.run import NodeRow, Run
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.cost_estimate import CostEstimate, estimate_costs

# In the place of a value that one of two recipes does not have.
ABSENT = "absent"


@dataclass(frozen=True)
class FieldChange:
    """A setting that differs. operational: it is in no key."""

    field: str
    before: Any
    after: Any
    operational: bool


@dataclass(frozen=True)
class StageChange:
    """A stage of the second recipe whose key is not that of the first. before: the key in the first recipe, None if it
    has no such stage. because: the settings of the stage that differ, and the inputs with other keys."""

    name: str
    before: str | None
    key: str
    state: str
    settings: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def because(self) -> str:
        if self.before is None:
            return "new"
        return ", ".join([*self.settings, *(f"input {name}" for name in self.inputs)])


@dataclass(frozen=True)
class Difference:
    """unsealed: stages with equal keys in both recipes that are not sealed in this home. costs: of those changed stages
    that are not sealed."""

    fields: tuple[FieldChange, ...]
    stages: tuple[StageChange, ...]
    removed: tuple[str, ...]
    unchanged: int
    unsealed: tuple[str, ...]
    costs: CostEstimate

    def json(self) -> dict[str, Any]:
        return {
            "fields": [asdict(change) for change in self.fields],
            "stages": [{**asdict(change), "because": change.because} for change in self.stages],
            "removed": list(self.removed),
            "unchanged": self.unchanged,
            "unsealed": list(self.unsealed),
            "cost": self.costs.json(),
        }


def compare(first: Graph, second: Graph, store: Store, profile: Profile) -> Difference:
    """The difference of two graphs, with states and costs of the second one's stages in this home.

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
        unsealed=tuple(name for name in unchanged if states[name].text == "to run"),
        costs=estimate_costs(plan(second, states, names), profile, is_small(second)),
    )


def field_changes(
    before: Mapping[str, tuple[Any, bool]], after: Mapping[str, tuple[Any, bool]]
) -> Iterator[FieldChange]:
    """The fields of two flat mappings, to (value, operational), whose values differ. A section that only one has is
    stated by its fields, not as null in the other."""
    for field in dict.fromkeys([*before, *after]):
        (old, old_kind), (new, new_kind) = before.get(field, (ABSENT, True)), after.get(field, (ABSENT, True))
        if old != new and (old, new) not in ((None, ABSENT), (ABSENT, None)):
            yield FieldChange(field, old, new, old_kind and new_kind)


def _settings(graph: Graph) -> dict[str, tuple[Any, bool]]:
    """The settings of a recipe and, below `data recipe`, of its data recipe. Name, version and description of a release
    are in no key."""
    fields = dict(flat(graph.recipe.config))
    fields |= {name: (fields[name][0], True) for name in ("name", "version", "description")}
    return fields | {f"data recipe: {name}": value for name, value in flat(graph.recipe.data)}


def _stage_change(first: Graph, second: Graph, node: Node, state: str) -> StageChange:
    if node.name not in first.nodes:
        return StageChange(node.name, None, node.key, state, (), ())
    old = first.nodes[node.name]
    settings = [
        change.field for change in field_changes(dict(flat(identity(old.config))), dict(flat(identity(node.config))))
    ]
    if (old.stage.name, old.stage.version) != (node.stage.name, node.stage.version):
        settings.append("stage")
    before, after = first.materials(old), second.materials(node)
    inputs = [node.inputs.get(role, role) for role in dict.fromkeys([*before, *after])
              if before.get(role) != after.get(role)]  # fmt: skip
    return StageChange(node.name, old.key, node.key, state, tuple(settings), tuple(dict.fromkeys(inputs)))


# Of a log of metrics, from which the last values come: some 20,000 steps.
LAST_BYTES = 4 * 2**20
# Points of a curve; of a longer one, as many at equal distances, and the last.
LONGEST_CURVE = 2000


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
    """One run. settings: of the recipe files that it began with, by field. metrics: the last value of each curve, by
    stage. scores: by stage. cost: of all attempts at its stages, in whatever run; spent: of those in this run alone."""

    run: Run
    sealed: int
    keys: dict[str, str]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    scores: dict[str, dict[str, float]]
    curves: dict[str, dict[int, float]]
    cost: Cost
    spent: Cost

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
            "curves": self.curves,
            "cost": self.cost.json(),
            "spent": self.spent.json(),
        }


def measure(run: Run, store: Store, curves: Sequence[str] = ()) -> Measured:
    """Reads the metrics, scores and costs of a run so far. curves: `STAGE.METRIC`, to be read by step.

    Raises AtomError for a curve that the run does not have; a damaged file is reported and left out.
    """
    metrics, scores, by_step = {}, {}, {}
    uses: list[tuple[dict[str, Any], bool]] = []
    sealed = 0
    for node in run.body["nodes"]:
        statements = [body for _, body in provenance.read(store.ledger, node["key"])]
        uses += [(provenance.usage(body), _invocation(body)[0] == run.id) for body in statements]
        if store.sealed(node["key"]):
            sealed += 1
            try:
                if numbers := scores_of(store.manifest(node["key"])):
                    scores[node["name"]] = numbers
            except Damaged as error:
                json_files.report(error, "its scores are left out")
        path = _log(run, store, node, statements)
        if last := last_values(path):
            metrics[node["name"]] = last
        for curve in (curve for curve in curves if curve.rpartition(".")[0] == node["name"]):
            by_step[curve] = curve_of(path, curve.rpartition(".")[2])
    for curve in curves:
        if not by_step.get(curve):
            known = ", ".join(f"{stage}.{name}" for stage, values in metrics.items() for name in values)
            raise AtomError(f"run {run.id} has no curve {curve}; it has {known or 'none'}")
    prices = run.body.get("prices")
    return Measured(
        run,
        sealed,
        {node["name"]: node["key"] for node in run.body["nodes"]},
        settings_of(run),
        metrics,
        scores,
        by_step,
        _cost([use for use, _ in uses], prices),
        _cost([use for use, is_here in uses if is_here], prices),
    )


def differing_settings(rows: Sequence[Measured]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with the value of each run."""
    fields = dict.fromkeys(field for row in rows for field in row.settings)
    values = {field: [row.settings.get(field, ABSENT) for row in rows] for field in fields}
    return {field: each for field, each in values.items() if any(value != each[0] for value in each)}


def last_values(path: Path) -> dict[str, float]:
    """The last value of each curve in a log of metrics; none without a log. Of a long log only the end is read."""
    values: dict[str, float] = {}
    for row in Tail(path, POINT, _line_after(path, LAST_BYTES)).read():
        values |= curves_of(row)
    return values


def curve_of(path: Path, metric: str) -> dict[int, float]:
    """{step: value} of a curve. A step that was trained again has its latest value."""
    values: dict[int, float] = {}
    for row in _rows(path):
        curve = curves_of(row)
        if metric in curve:
            values[row["step"]] = curve[metric]
    steps = sorted(values)
    stride = -(-len(steps) // LONGEST_CURVE) or 1
    kept = [*steps[::stride], *steps[-1:]]
    return {step: values[step] for step in dict.fromkeys(kept)}


def _rows(path: Path) -> Iterator[Point]:
    tail = Tail(path, POINT, whole=True)
    while True:
        yield from tail.read()
        if not tail.has_more:
            return


def _line_after(path: Path, limit: int) -> int:
    """The offset of the first whole line within the last `limit` bytes of a file."""
    try:
        with json_files.open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= limit:
                return 0
            file.seek(size - limit)
            file.readline(limit)
            return file.tell()
    except (FileNotFoundError, Damaged):  # Tail reports what is damaged
        return 0


def _log(run: Run, store: Store, node: NodeRow, statements: Sequence[Statement]) -> Path:
    """The log of metrics of the attempt that sealed a stage, perhaps in another run; else that of this run."""
    name = "metrics.jsonl"
    here = run.node_folder(node["name"]) / name
    if here.exists():
        return here
    for body in reversed(statements):
        origin, stage = _invocation(body)
        if provenance.outcome(body) == "sealed" and origin:
            return store.logs / origin / stage / name
    return here


def _invocation(body: Statement) -> tuple[str, str]:
    """The run and the stage of an attempt; two empty texts if the statement does not say it as a place of logs."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w@.-]*)", provenance.invocation(body))
    return (match[1], match[2]) if match else ("", "")


def _cost(uses: Sequence[dict[str, Any]], prices: Any) -> Cost:
    def hours(field: str) -> float:
        return sum(float(use.get(field, 0.0)) for use in uses) / 3600

    core_hours, gpu_hours = hours("cpu_seconds"), hours("gpu_seconds")
    money = gpu_hours * prices["gpu_hour"] + core_hours * prices["core_hour"] if prices else None
    return Cost(
        hours("wall_seconds"), core_hours, gpu_hours, hours("energy_joules_estimate"), len(uses), money,
        prices["currency"] if prices else None,
    )  # fmt: skip
