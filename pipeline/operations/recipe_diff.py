"""Compares two recipes: which settings differ, which keys change, and what would run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.stage import identity
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph.dag import Graph, Node
from pipeline.graph.plan import is_small, plan
from pipeline.graph.settings import flat
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.cost_estimate import CostEstimate, estimate_costs

ABSENT = "absent"
"""In the place of a value that one of two recipes does not have."""


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
