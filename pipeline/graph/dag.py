"""Recipe → stages with keys. Every key is known before anything runs, because a key hashes keys, not bytes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline.core import provenance
from pipeline.core.code_digests import code_digests
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Stage, identity
from pipeline.core.store import Store, canonical, sha256_bytes
from pipeline.core.text import escaped
from pipeline.graph import checkpoints, registry
from pipeline.graph.checkpoints import Checkpoint
from pipeline.graph.recipe import Recipe, explain
from stages import post_training_graph


@dataclass(frozen=True)
class Phase:
    """A training phase of a recipe: the name of its node, the stage that runs it, where its section stands in the
    recipe, and its section."""

    node: str
    stage: str
    where: str
    config: Any


def phases(config: Any) -> list[Phase]:
    """The training phases of a recipe, in order."""
    found = [Phase(name, name, name, getattr(config, name)) for name in ("pretrain", "midtrain")]
    for number, part in enumerate(config.long_context):
        found.append(Phase(f"longcontext-{number + 1}", "midtrain", f"long_context.{number}", part))
    if config.sft is not None:
        found.append(Phase("sft", "sft", "sft", config.sft))
    return found


def models(config: Any) -> dict[str, tuple[str, int | None]]:
    """Exported models, the final one last: name → (node of the phase, step); None is the phase's last step."""
    found: dict[str, tuple[str, int | None]] = {"init": ("pretrain", 0), "base": ("pretrain", None)}
    found["mid"] = ("midtrain", None)
    found |= {f"long-{n + 1}": (f"longcontext-{n + 1}", None) for n in range(len(config.long_context))}
    found |= {name: (name, None) for name in ("sft", "rlvr", "rlhf") if getattr(config, name) is not None}
    return found | ({"online": ("online", None)} if config.rlhf and config.rlhf.online else {})


@dataclass(frozen=True)
class Node:
    """One stage of a recipe's graph: its resolved config and the nodes that feed it, by role.

    external: keys of artifacts of earlier runs that feed it as well, by role.
    """

    name: str
    stage: Stage
    config: Config
    inputs: dict[str, str]
    key: str
    external: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The nodes in an order in which each follows its inputs.

    absent: sentences on sources whose files are not here; such a graph can be looked at, not run.
    """

    recipe: Recipe
    nodes: dict[str, Node]
    absent: tuple[str, ...] = ()

    def upstream(self, names: set[str]) -> set[str]:
        """`names` and everything that they need, directly or not."""
        needed = set(names)
        for name in reversed(self.nodes):
            if name in needed:
                needed.update(self.nodes[name].inputs.values())
        return needed

    def materials(self, node: Node) -> dict[str, str]:
        """The keys of all that feeds a node, by role."""
        return {role: self.nodes[name].key for role, name in node.inputs.items()} | dict(node.external)

    def select(self, until: str | None, only: str | None) -> list[str]:
        """The nodes that a command asks for, in order. Raises AtomError for a stage that the recipe does not have."""
        for name in (until, only):
            if name is not None and name not in self.nodes:
                near = difflib.get_close_matches(name[:100], self.nodes, 1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise AtomError(f"{self.recipe.title} has no stage {escaped(name, 80)}; {hint} {_listed(self.nodes)}")
        if only:
            return [only]
        wanted = self.upstream({until}) if until else set(self.nodes)
        return [name for name in self.nodes if name in wanted]


def compose(recipe: Recipe, store: Store, without_data: bool = False) -> Graph:
    """The graph of a release. Reads the digests of source trees and, if a phase goes on from an earlier run, which
    checkpoints are sealed. Raises RecipeError.

    without_data: source trees may be absent; keys of what comes from one without a pinned digest are provisional.
    """
    c = recipe.config
    _check_across(recipe)
    nodes: dict[str, Node] = {}

    def add(
        name: str, stage: str, config: dict[str, Any], external: Mapping[str, str] | None = None, /, **inputs: str
    ) -> None:
        found = registry.stage(stage)
        try:
            resolved = found.config.model_validate(config)
        except ValidationError as error:
            raise explain(error, found.config, f"{recipe.title}, stage {name}") from None
        keys = {role: nodes[n].key for role, n in inputs.items()} | dict(external or {})
        key = f"{name}-{sha256_bytes(canonical([found.name, found.version, identity(resolved), keys]))[:12]}"
        nodes[name] = Node(name, found, resolved, inputs, key, external or {})

    data, absent = recipe.data.present() if without_data else (recipe.data.resolved(), ())
    sources = {s.name: f"acquire-{s.name}" for s in data.sources}
    for source, name in sources.items():
        add(name, "acquire", data.acquire_config(source, c.seed))
    add("items", "items", {"problems": c.evaluation.problems, "seed": c.seed, "chat": c.evaluation.chat_items})
    add("filter", "filter", data.filter_config(c.seed), **sources, items="items")
    add("curate", "curate", data.curate_config(), filter="filter")
    chats = data.conversations
    left_out = {"leave_out": (*c.tokenizer.leave_out, *chats)}
    add("tokenizer", "tokenizer", c.tokenizer.model_dump() | left_out, curate="curate")
    add(
        "tokenize",
        "tokenize",
        {"conversations": chats, "shards": data.curation.shards},
        curate="curate",
        tokenizer="tokenizer",
    )

    previous: dict[str, str] = {}
    model, trained_as = c.model, {}
    for phase in phases(c):
        p, name, earlier = phase.config, phase.node, {}
        longest = p.sequence_length if phase.where.startswith("long_context") else model.context_length
        model = model.with_rope(p.rope, longest)
        trained_as[name] = (model, "float32" if p.precision == "fp32" else "bfloat16")
        if p.continue_from:
            where = f"{recipe.title}: {phase.where}.continue_from"
            checkpoint = checkpoints.find(p.continue_from, name, where, store)
            _same_beginning(checkpoint, {role: nodes[n].key for role, n in previous.items()}, where, store)
            p, earlier = p.model_copy(update={"continue_from": str(checkpoint)}), {"continue": checkpoint.key}
        order = {"phase": name, "mix": p.mix, "sequence_length": p.sequence_length, "steps": p.steps}
        order |= {"rows": p.rows_of(p.steps), "ramp": p.row_ramp, "pack": p.pack, "long_documents": p.long_documents}
        order |= {"seed": c.seed, "first_step": p.first_step}
        add(f"order-{name}", "order", order, earlier, tokens="tokenize")
        training = {"model": model, "phase": p, "padded_vocab_size": c.tokenizer.padded_vocab_size, "seed": c.seed}
        add(name, phase.stage, training, earlier, tokens="tokenize", order=f"order-{name}", **previous)
        previous = {"init": name}

    trained_as |= post_training_graph.phases(c, model, previous, add)
    for which, (name, step) in models(c).items():
        made, dtype = trained_as[name]
        export = {"model": made, "padded_vocab_size": c.tokenizer.padded_vocab_size, "step": step, "dtype": dtype}
        trained = {"checkpoint": name}
        if step == 0 and nodes[name].external:  # a phase that goes on has no step 0
            export, trained = {**export, "seed": c.seed}, {}
        add(f"export-{which}", "export", export, tokenizer="tokenizer", **trained)
        measured = {name: getattr(c.evaluation, name) for name in ("heldout_documents", "max_new_tokens", "context")}
        measured["conversations"] = chats
        add(f"evaluate-{which}", "evaluate", measured, model=f"export-{which}", curate="curate", items="items")

    post_training_graph.evaluation(c, list(models(c)), nodes, add)
    _check_sizes(recipe, nodes)
    return Graph(recipe, nodes, absent)


def _same_beginning(checkpoint: Checkpoint, previous: Mapping[str, str], where: str, store: Store) -> None:
    """Raises RecipeError if the phase of a checkpoint began from another earlier phase than this recipe has: the base
    model of the release would not be the one that its final model came from."""
    body = checkpoints.statement(checkpoint.key, store)
    for role, key in previous.items():
        began = provenance.material_keys(body).get(role, key) if body else key
        if began != key:
            raise RecipeError(
                f"{where} = {checkpoint} began from {began}, but this recipe's is {key}; take over that recipe's "
                "sections up to this phase, or start the phase anew"
            )


def _check_across(recipe: Recipe) -> None:
    """What no single section can check."""
    c, title = recipe.config, recipe.title
    names = [s.name for s in recipe.data.sources]
    before = 0
    for where, mix in {
        **{phase.where: phase.config.mix for phase in phases(c)},
        **post_training_graph.replays(c),
    }.items():
        for source in mix:
            if source not in names:
                near = difflib.get_close_matches(source, names, 1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise RecipeError(
                    f"{title}: {where}.mix names {source}, which data recipe {escaped(c.data, 80)} does not have; "
                    f"{hint} {_listed(names)}"
                )
        if abs(sum(mix.values()) - 1) > 1e-6:
            raise RecipeError(f"{title}: {where}.mix sums to {sum(mix.values()):g}; the shares must sum to 1")
    for phase in phases(c):
        p, where = phase.config, phase.where
        if phase.where.startswith("long_context") and p.sequence_length <= before:
            raise RecipeError(
                f"{title}: {where}.sequence_length = {p.sequence_length} is no longer than the {before} tokens of the "
                "phase before; long_context phases only lengthen"
            )
        before = p.sequence_length if phase.node != "sft" else before
        if p.sequence_length > c.model.context_length and phase.node == phase.stage:
            raise RecipeError(
                f"{title}: {where}.sequence_length = {p.sequence_length} is longer than model.context_length = "
                f"{c.model.context_length}; shorten the sequence, raise the context length, or make it a phase of "
                "long_context"
            )


MOST_FLOPS = 1e27
"""Of a training phase; the largest runs until 2025 took about 5e26 (epoch.ai/data/ai-models)."""
MOST_MEMORY = 2**42
"""Bytes of one rank, on whatever device: 4 TiB. The largest accelerators have 288 GB."""
MOST_DISK = 1e18
"""Bytes of the checkpoints of a phase: an exabyte, more than the largest file systems of clusters hold."""


def _check_sizes(recipe: Recipe, nodes: Mapping[str, Node]) -> None:
    """That no training phase asks for what no machine has: each number may be possible where their product is not."""
    for name, node in nodes.items():
        estimate = node.stage.estimate(node.config)
        if estimate.training is None:
            continue
        where = f"{recipe.title}, stage {name}"
        flops, memory, disk = estimate.flops or 0.0, estimate.memory_bytes or 0, estimate.disk_bytes or 0
        if flops > MOST_FLOPS:
            raise RecipeError(
                f"{where}: {estimate.tokens:.2g} tokens of {estimate.parameters['active']:.2g} active parameters are "
                f"{flops:.1e} FLOPs; use at most {MOST_FLOPS:.0e} (Llama 3 405B: 4e25), by fewer steps, smaller "
                "batches, or a smaller model"
            )
        if memory > MOST_MEMORY:
            raise RecipeError(
                f"{where}: a rank would hold {memory / 2**40:.3g} TiB; use at most {MOST_MEMORY >> 40}, by more ranks "
                "and parallelism.tp, pp, ep or cp, or by smaller micro_tokens"
            )
        if disk > MOST_DISK:
            raise RecipeError(
                f"{where}: {estimate.training.release_checkpoints} sealed checkpoints are {disk:.1e} bytes; use at "
                f"most {MOST_DISK:.0e}, by a larger release_checkpoint_interval"
            )


def _listed(names: Iterable[str], most: int = 60) -> str:
    """Names in words, the first ones if there are many."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


@dataclass(frozen=True)
class State:
    """What is known of a node's artifact without hashing it: `sealed`, `stale` (sealed by other code), `damaged` or
    `to run`. damage: what is wrong with it."""

    name: str
    key: str
    text: str
    changed: tuple[str, ...] = ()
    damage: str | None = None


def states(graph: Graph, store: Store) -> dict[str, State]:
    """The state of every node. A stale artifact is still used: its key says that it is what was asked for."""
    out = {}
    for name, node in graph.nodes.items():
        text = "to run"
        changed: tuple[str, ...] = ()
        if store.sealed(node.key):
            if damage := store.damage(node.key):
                out[name] = State(name, node.key, "damaged", damage=damage)
                continue
            artifact = store.manifest(node.key)
            made = provenance.sealed(store.ledger, artifact)
            now = code_digests(registry.STAGES[node.stage.name])
            then = provenance.code_of(made[1]) if made else now
            changed = tuple(sorted(m for m in set(now) | set(then) if now.get(m) != then.get(m)))
            text = "stale" if changed else "sealed"
        out[name] = State(name, node.key, text, changed)
    return out
