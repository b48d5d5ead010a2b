"""The nodes of a recipe's graph that export models, and that write the final model's weights in other forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import RecipeError
from pipeline.graph.dag import NodeSpec
from stages.export.variants import registry as variants
from stages.train.nodes import ExportedModel, TrainedModel

PARITY_TOKENS = 4096
"""Longest row of the parity check of a model whose context is more than twice as long."""


def export_node(
    model: ExportedModel, converses: bool, padded_vocab_size: int, parity_tolerance: float, seed: int
) -> NodeSpec:
    """Returns the node that exports a model.

    Args:
        model: The model.
        converses: True if it was trained on conversations.
        padded_vocab_size: Rows of the embedding matrix.
        parity_tolerance: Largest difference of a logit between an export and the trainer.
        seed: Seed of the recipe, from which initial weights are drawn again.
    """
    config = _export_config(model.trained, padded_vocab_size, parity_tolerance)
    config["step"] = model.step
    config["converses"] = converses
    inputs = {"tokenizer": "tokenizer", "checkpoint": model.node}
    if lora := model.trained.lora:
        config["lora"] = lora
        inputs["base"] = model.trained.base
    if model.step == 0 and model.trained.continued:
        # A phase that continues an earlier run has no step 0: its initial weights are drawn again.
        config["seed"] = seed
        del inputs["checkpoint"]
    return NodeSpec(model.export_node, "export", config, inputs)


def reward_node(reward: TrainedModel, padded_vocab_size: int, parity_tolerance: float) -> NodeSpec:
    """Returns the node that exports the reward model, with which online RLHF scores answers."""
    config = _export_config(reward, padded_vocab_size, parity_tolerance)
    return NodeSpec("export-reward", "export", config, {"tokenizer": "tokenizer", "checkpoint": "reward"})


def _export_config(trained: TrainedModel, padded_vocab_size: int, parity_tolerance: float) -> dict[str, Any]:
    context_length = trained.model.context_length
    return {
        "model": trained.model,
        "dtype": trained.dtype,
        "padded_vocab_size": padded_vocab_size,
        "parity_tolerance": parity_tolerance,
        # The work of a row grows with the square of its length, and the check computes on one core.
        "parity_tokens": PARITY_TOKENS if context_length > 2 * PARITY_TOKENS else None,
    }


def variant_nodes(
    models: Mapping[str, ExportedModel],
    repositories: Mapping[str, str],
    names: tuple[variants.VariantName, ...],
    evaluation: Mapping[str, Any],
    title: str,
    student: ExportedModel | None = None,
) -> list[NodeSpec]:
    """Returns the nodes of the variants of the final model. Adapters and students are variants of their own.

    Args:
        models: The exported models by name, the final one last.
        repositories: The repository of each on the Hub.
        names: The variants that the recipe names.
        evaluation: Settings of the final model's evaluation, which each variant repeats.
        title: Name of the recipe, for errors.
        student: The smaller model that the final one was distilled into, if there is one.

    Raises:
        RecipeError: The model cannot have one of the variants.
    """
    specs = []
    final = list(models.values())[-1]
    inputs = {"model": final.export_node, "scores": final.scores_node, "dedup": "dedup", "items": "items"}
    if lora := final.trained.lora:
        base = next(m.name for m in models.values() if m.node == final.trained.base and m.step is None)
        source = {"lora": lora, "model": final.trained.model, "repo": repositories[base]}
        config = {**evaluation, "variant": variants.ADAPTER, "adapter": source}
        below = {"base": f"export-{base}", "checkpoint": final.node}
        specs.append(NodeSpec(f"variant-{variants.ADAPTER}", "variant", config, inputs | below))
    if student is not None:
        config, of_student = {**evaluation, "variant": variants.DISTILLED}, inputs | {"student": student.export_node}
        specs.append(NodeSpec(f"variant-{variants.DISTILLED}", "variant", config, of_student))
    for name in names:
        if problem := variants.obstacle(name, final.trained.model):
            raise RecipeError(f"{title}: release.variants: {problem}")
        specs.append(NodeSpec(f"variant-{name}", "variant", {**evaluation, "variant": name}, inputs))
    return specs
