"""The nodes of a recipe's graph that measure models: on held-out data, problems, conversations and task sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.graph.dag import NodeSpec
from stages.data.recipe import DataRecipe
from stages.evaluation import estimates, pass_at_k, win_rate
from stages.evaluation.estimates import QUESTION_TOKENS, count
from stages.evaluation.settings import ChatSection, EvaluationSection
from stages.train.nodes import ExportedModel


@dataclass(frozen=True)
class Measured:
    """The models of a recipe and what their evaluation needs."""

    section: EvaluationSection
    data: DataRecipe
    # All exported models by name, the final one last.
    models: Mapping[str, ExportedModel]
    padded_vocab_size: int
    # Seed of the recipe.
    seed: int
    # Name of the recipe, for errors.
    title: str


def item_nodes(
    section: EvaluationSection, seed: int, base: Path, title: str
) -> tuple[list[NodeSpec], dict[str, str], dict[str, Any]]:
    """Returns the nodes of evaluation items, these nodes by role, and the config of the benchmarks.

    Args:
        section: The section `evaluation`.
        seed: Seed of the recipe.
        base: Folder of the recipe, from which task sets of its own are found.
        title: Name of the recipe, for errors.

    Raises:
        RecipeError: A task set of the recipe's own is missing, or differs from its pin.
    """
    chat = None if section.chat is None else section.chat.items.model_dump()
    items = {"problems": section.problems, "seed": seed, "chat": chat}
    specs, roles = [NodeSpec("items", "items", items)], {"items": "items"}
    benchmarks: dict[str, Any] = {}
    if harness := section.harness:
        benchmarks = {"sets": harness.task_sets(base, title), "limit": harness.limit}
        specs.append(NodeSpec("benchmarks", "benchmarks", benchmarks))
        roles["benchmarks"] = "benchmarks"
    return specs, roles, benchmarks


def heldout_config(measured: Measured, model: ExportedModel) -> dict[str, Any]:
    """Returns the settings of a model's evaluation on held-out documents and problems, without long texts."""
    section, sources = measured.section, len(measured.data.sources)
    return {
        "heldout_documents": section.heldout_documents,
        "max_new_tokens": section.max_new_tokens,
        "engine": section.engine,
        "conversations": measured.data.conversations,
        "expected": _expected(measured, model, section.tokens(sources), section.pieces(sources)),
    }


def heldout_node(measured: Measured, model: ExportedModel) -> NodeSpec:
    """Returns the node that evaluates a model on held-out documents, problems and long texts."""
    config = heldout_config(measured, model) | {"context": measured.section.context}
    inputs = {"model": f"export-{model.name}", "dedup": "dedup", "items": "items"}
    return NodeSpec(f"evaluate-{model.name}", "evaluate", config, inputs)


def chat_nodes(measured: Measured, chat_models: Sequence[str], before: Sequence[NodeSpec]) -> list[NodeSpec]:
    """Returns the nodes that evaluate models in conversations, and the search for test items in training data.

    Args:
        measured: The models of the recipe.
        chat_models: Names of the models that were trained on conversations, in order.
        before: All earlier nodes of the graph, among which are the tasks, orders and evaluations to search in.
    """
    section, data = measured.section, measured.data
    chat = section.chat
    if chat is None or not chat_models:
        return []
    tasks = {spec.name: spec.name for spec in before if spec.stage == "tasks"}
    orders = {spec.name: spec for spec in before if spec.stage == "order"}
    # The sources of each phase are those that its order mixes.
    mixes = {order.config["phase"]: sorted(order.config["mix"]) for order in orders.values()}
    sources = sorted({name for mix in mixes.values() for name in mix})
    corpus = {"parts": {source: data.parts[source] for source in sources}, "expected": data.expected}
    fresh = {"problems": section.problems, "phases": mixes, **corpus}
    inputs = {"model": f"export-{chat_models[-1]}", "dedup": "dedup", "items": "items"}
    specs = [NodeSpec("fresh", "fresh", fresh, inputs | tasks)]
    for number, which in enumerate(chat_models):
        specs += _solving_nodes(measured, chat, which)
        if number and chat.items.courtesies > 1:
            # Each model is compared with the one before; one of online RLHF with the last before preferences.
            previous = chat_models[number - 2 if which == "online-rlhf" else number - 1]
            specs.append(_preference_node(measured, chat, which, previous))
    # Last, since the search compares all scores before it with what it finds.
    scored = {spec.name: spec.name for spec in (*before, *specs) if spec.stage in ("evaluate", "solve")}
    inputs = {"dedup": "dedup", "items": "items", "fresh": "fresh"}
    if section.harness:
        inputs["benchmarks"] = "benchmarks"
    inputs |= {name: name for name in orders} | tasks | scored
    specs.append(NodeSpec("contamination", "contamination", corpus, inputs))
    return specs


def _solving_nodes(measured: Measured, chat: ChatSection, which: str) -> list[NodeSpec]:
    """Returns the nodes in which a model answers the items, and the items drawn after training."""
    items = sum(measured.section.problems.values()) + chat.items.courtesies
    tokens = items * (QUESTION_TOKENS + chat.max_new_tokens) * chat.num_samples
    expected = _expected(measured, measured.models[which], tokens, count(items, pass_at_k.ITEMS_PER_BATCH))
    config = _generation(measured, chat) | {"expected": expected, "num_samples": chat.num_samples}
    model = f"export-{which}"
    return [
        NodeSpec(f"solve-{which}", "solve", config, {"model": model, "items": "items"}),
        NodeSpec(f"fresh-solve-{which}", "solve", config, {"model": model, "items": "fresh"}),
    ]


def _preference_node(measured: Measured, chat: ChatSection, which: str, previous: str) -> NodeSpec:
    """Returns the node that compares the answers of two models."""
    items = sum(measured.section.problems.values()) + chat.items.courtesies
    tokens = items * (QUESTION_TOKENS + chat.max_new_tokens)
    pieces = max(1, len(win_rate.SIDES) * count(chat.items.courtesies, win_rate.ITEMS_PER_BATCH))
    expected = _expected(measured, measured.models[which], tokens, pieces)
    config = _generation(measured, chat) | {"expected": expected, "model": which, "before": previous}
    inputs = {"model": f"export-{which}", "before": f"export-{previous}", "items": "items"}
    return NodeSpec(f"prefer-{which}", "prefer", config, inputs)


def _generation(measured: Measured, chat: ChatSection) -> dict[str, Any]:
    return {"max_new_tokens": chat.max_new_tokens, "seed": measured.seed, "engine": measured.section.engine}


def harness_nodes(measured: Measured, benchmarks: Mapping[str, Any]) -> list[NodeSpec]:
    """Returns the node that runs the task sets on the final model; their config is `benchmarks`."""
    section, engine = measured.section.harness, measured.section.engine
    if section is None:
        return []
    tokens, tasks = section.tokens(), section.tasks()
    # A model with a step is a checkpoint from within a phase.
    final = [model for model in measured.models.values() if model.step is None][-1]
    config = {**benchmarks, "expected": _expected(measured, final, tokens, tasks), "engine": engine}
    inputs = {"model": f"export-{final.name}", "benchmarks": "benchmarks"}
    return [NodeSpec(f"harness-{final.name}", "harness", config, inputs)]


def _expected(measured: Measured, model: ExportedModel, tokens: int, pieces: int = 1) -> estimates.Expected:
    """Returns what `atom plan` expects of a measurement of so many tokens in so many pieces."""
    trained, engine = model.trained, measured.section.engine
    return estimates.expected(trained.model, measured.padded_vocab_size, tokens, pieces, trained.dtype, engine)
