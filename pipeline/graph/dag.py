"""Recipe → stages with keys, and the release checkpoints that a phase continues from.

Every key is known before anything runs, because a key hashes keys, not bytes. A checkpoint is written
`pretrain-<12 hex>@1200`: the key of the phase that trained it, and its step. `pretrain@1200` is short for the only
sealed checkpoint of that step in this home.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline.core import json_files, provenance
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.source_code import code_digests
from pipeline.core.stage import Config, Stage, identity
from pipeline.core.store import Store, canonical, sha256_bytes
from pipeline.core.text import escaped
from pipeline.graph import registry
from pipeline.graph.recipe import Recipe, explain
from pipeline.graph.supply import SourceSupply


@dataclass(frozen=True)
class Node:
    """One stage of a recipe's graph."""

    name: str
    stage: Stage
    config: Config
    # The nodes that feed it, by role.
    inputs: dict[str, str]
    key: str
    # The keys of further input artifacts from earlier runs, by role.
    external: Mapping[str, str] = field(default_factory=dict)
    # Nodes that must be sealed before it starts although it reads nothing of them, so that its key does not have them.
    after: tuple[str, ...] = ()

    @property
    def precursors(self) -> list[str]:
        """The nodes that it waits for."""
        return list(dict.fromkeys((*self.inputs.values(), *self.after)))


@dataclass(frozen=True)
class Graph:
    """The nodes in topological order: each follows its inputs."""

    recipe: Recipe
    nodes: dict[str, Node]
    # Sentences on sources whose files are missing; such a graph can be shown but not run.
    absent: tuple[str, ...] = ()

    def upstream(self, names: set[str]) -> set[str]:
        """Returns `names` and all their inputs, direct and indirect."""
        needed = set(names)
        # In reverse order, every node comes after those that read it, so one pass is enough.
        for name in reversed(self.nodes):
            if name in needed:
                needed.update(self.nodes[name].precursors)
        return needed

    def materials(self, node: Node) -> dict[str, str]:
        """Returns the keys of all inputs of a node, by role."""
        return {role: self.nodes[name].key for role, name in node.inputs.items()} | dict(node.external)

    def select(self, until: str | None, only: str | None) -> list[str]:
        """Returns the nodes that a command selects, in order.

        Raises AtomError for a stage that the recipe does not have.
        """
        for name in (until, only):
            if name is not None and name not in self.nodes:
                near = difflib.get_close_matches(name[:100], self.nodes, 1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise AtomError(
                    f"{self.recipe.title} has no stage {escaped(name, 80)}; {hint} {names_in_words(self.nodes)}"
                )
        if only:
            return [only]
        names = self.upstream({until}) if until else set(self.nodes)
        return [name for name in self.nodes if name in names]


@dataclass(frozen=True)
class NodeSpec:
    """A node as a section of the recipe asks for it, before its key is known.

    Attributes:
        name: Name of the node, unique in its graph.
        stage: Name of the stage that runs it.
        config: Settings of the stage, not yet validated.
        inputs: The nodes whose artifacts it reads, by role. They precede it.
        continued: The sealed checkpoint of an earlier run that it starts from, if there is one.
        after: Nodes that it waits for and does not read. They may stand after it in a list of nodes.
    """

    name: str
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    continued: Checkpoint | None = None
    after: tuple[str, ...] = ()


def in_order(specs: Sequence[NodeSpec]) -> list[NodeSpec]:
    """Returns nodes in topological order; those that are in one already stay in place."""
    by_name, ordered = {spec.name: spec for spec in specs}, dict[str, NodeSpec]()

    def add(spec: NodeSpec) -> None:
        if spec.name not in ordered:
            for name in (*spec.inputs.values(), *spec.after):
                add(by_name[name])
            ordered[spec.name] = spec

    for spec in specs:
        add(spec)
    return list(ordered.values())


def build_graph(recipe: Recipe, specs: Iterable[NodeSpec], absent: tuple[str, ...] = ()) -> Graph:
    """Validates the config of each node, computes its key, and returns the graph.

    Args:
        recipe: The recipe that the graph belongs to.
        specs: The nodes, each after its inputs.
        absent: Sentences on sources whose files are missing.

    Raises:
        RecipeError: A stage refuses its config.
    """
    nodes: dict[str, Node] = {}
    for spec in in_order(list(specs)):
        stage = registry.stage(spec.stage)
        where = f"{recipe.title}, stage {spec.name}"
        try:
            config = stage.config.model_validate(spec.config)
        except ValidationError as error:
            raise explain(error, stage.config, where) from None
        external = {"continue": spec.continued.key} if spec.continued else {}
        keys = {role: nodes[name].key for role, name in spec.inputs.items()} | external
        work = [stage.name, stage.version, identity(config), keys]
        if used := recipe.extensions.used_by(work[2]):
            work.append(used)
        digest = sha256_bytes(canonical(work))
        nodes[spec.name] = Node(
            spec.name, stage, config, dict(spec.inputs), f"{spec.name}-{digest[:12]}", external, spec.after
        )
    return Graph(recipe, nodes, absent)


def compose(recipe: Recipe, store: Store, without_data: bool = False) -> Graph:
    """Returns the graph of a recipe by the registered definition. Raises RecipeError.

    With `without_data`, source trees may be absent. Keys that depend on a tree without a pinned digest are provisional
    then.
    """
    graph: Graph = registry.definition().compose(recipe, store, without_data)
    return graph


def problems(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence for each contradiction between the sections of a recipe, or with its data recipe."""
    return registry.definition().problems(recipe)


def supply(graph: Graph) -> tuple[SourceSupply, ...]:
    """Returns the supply of each source that a phase of the recipe reads."""
    rows: tuple[SourceSupply, ...] = registry.definition().supply(graph.recipe)
    return rows


def gates(graph: Graph, names: Collection[str]) -> list[Any]:
    """Returns the `pipeline.graph.plan.PlannedGate` of each gate on the effect of these phases."""
    return [gate for gate in registry.definition().gates(graph.recipe) if gate.phase in names]


def require_same_beginning(checkpoint: Checkpoint, previous: Mapping[str, str], where: str, store: Store) -> None:
    """Raises RecipeError if the phase of a checkpoint started from another earlier phase than this recipe has.

    With such a checkpoint, the final model of the release would not descend from its base model.
    """
    body = statement(checkpoint.key, store)
    for role, key in previous.items():
        began = provenance.material_keys(body).get(role, key) if body else key
        if began != key:
            raise RecipeError(
                f"{where} = {checkpoint} began from {began}, but this recipe's is {key}; take over that recipe's "
                "sections up to this phase, or start the phase anew"
            )


# Names in a sentence.
MOST_NAMES = 60


def names_in_words(names: Iterable[str]) -> str:
    """Returns names as a phrase; only the first ones if there are many."""
    every_name = list(names)
    rest = len(every_name) - MOST_NAMES
    return ", ".join(every_name[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class State:
    """The state of a node's artifact, without hashing."""

    name: str
    key: str
    # `sealed`, `stale` (sealed by other code), `damaged` or `to run`.
    text: str
    # The modules of a stale one.
    changed: tuple[str, ...] = ()
    # The damage in words.
    damage: str | None = None


def states(graph: Graph, store: Store) -> dict[str, State]:
    """Returns the state of every node. A stale artifact is still used: its key matches the requested work."""
    return {name: _state(node, store) for name, node in graph.nodes.items()}


def _state(node: Node, store: Store) -> State:
    if not store.sealed(node.key):
        return State(node.name, node.key, "to run")
    if damage := store.damage(node.key):
        return State(node.name, node.key, "damaged", damage=damage)
    statement = provenance.sealed(store.ledger, store.manifest(node.key))
    now = code_digests(registry.stages()[node.stage.name], node.stage.code(node.config))
    then = provenance.code_of(statement[1]) if statement else now
    changed = tuple(sorted(module for module in now | then if now.get(module) != then.get(module)))
    return State(node.name, node.key, "stale" if changed else "sealed", changed)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a phase after a step, sealed or not."""

    # Key of the phase that trained it.
    phase: str
    step: int

    def __str__(self) -> str:
        return f"{self.phase}@{self.step}"

    @property
    def node(self) -> str:
        """The name of the phase and the step, such as `pretrain@1200`."""
        return f"{self.phase.rsplit('-', 1)[0]}@{self.step}"

    @property
    def key(self) -> str:
        """The key of its artifact."""
        return f"{self.node}-{sha256_bytes(canonical([self.phase, self.step]))[:12]}"


def find(reference: str, phase: str, where: str, store: Store) -> Checkpoint:
    """Returns the checkpoint that a recipe names.

    The long form needs no lookup.

    Args:
        reference: The name: `<phase>@<step>`, or the long form `<phase>-<key>@<step>`.
        phase: The phase whose checkpoint it must be.
        where: The field of the recipe, for errors.
        store: The home.

    Raises:
        RecipeError: It is a checkpoint of another phase, or a short form that matches no sealed checkpoint or several.
    """
    match = re.fullmatch(rf"({phase}(?:-[0-9a-f]{{12}})?)@([0-9]+)", reference)
    if match is None:
        raise RecipeError(
            f"{where} = {reference} is no checkpoint of {phase}; write {phase}@STEP, or {phase}-KEY@STEP to say whose"
        )
    # The long form has the key of the phase.
    if match[1] != phase:
        return Checkpoint(match[1], int(match[2]))
    checkpoints = sealed(phase, store)
    matching = {checkpoint: run for checkpoint, run in checkpoints.items() if checkpoint.node == reference}
    if len(matching) > 1:
        runs = ", ".join(f"{checkpoint} of run {run}" for checkpoint, run in matching.items())
        raise RecipeError(
            f"{where} = {reference} fits {len(matching)} checkpoints: {runs}; write the one that is meant"
        )
    if not matching:
        nodes = {checkpoint.step: checkpoint.node for checkpoint in checkpoints}
        others = ", ".join(node for _, node in sorted(nodes.items()))
        hint = f"there are {others}" if others else "run the recipe to continue from first"
        raise RecipeError(f"{where} = {reference} is not sealed under {store.artifacts}; {hint}")
    return next(iter(matching))


def sealed(phase: str, store: Store) -> dict[Checkpoint, str]:
    """Returns every sealed checkpoint of a phase with the run that made it.

    A checkpoint without its statement is left out.
    """
    runs = {}
    for path in sorted(store.artifacts.glob(f"{phase}@*-*")):
        body = statement(path.name, store)
        of = provenance.parameters_of(body).get("of") if body else None
        if body and of:
            runs[Checkpoint(of["key"], of["step"])] = provenance.invocation(body).split("/")[0]
    return runs


def statement(key: str, store: Store) -> provenance.Statement | None:
    """Returns the statement that made a checkpoint; None if either is not here, or damaged, which is reported."""
    sealed_by = None
    with json_files.reporting("this checkpoint is left out"):
        if store.sealed(key):
            sealed_by = provenance.sealed(store.ledger, store.manifest(key))
    return sealed_by[1] if sealed_by else None
