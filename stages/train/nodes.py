"""The nodes of a recipe's graph that train on text: the import of published weights, the phases, smaller models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.graph.dag import Checkpoint, NodeSpec
from stages.mcore.lora import Lora
from stages.mcore.optimizer import Optimizer
from stages.models.base import ModelConfig
from stages.train import merge, smaller_model
from stages.train.config import PhaseConfig, SftPhase
from stages.train.imported_weights import StartFrom

Dtype = Literal["float32", "bfloat16"]
FP32_PARAMETERS = 10**9
"""Largest model that is published in fp32. A larger one is published in bf16, however it was trained."""


@dataclass(frozen=True)
class TextPhase:
    """A phase of a recipe that trains on text."""

    # Name of its node.
    node: str
    # Name of the stage that runs it.
    stage: str
    # Location of its section in the recipe.
    where: str
    # Its section.
    config: PhaseConfig

    @property
    def result(self) -> str:
        """The node whose weights the next phase and the export read."""
        return f"{merge.NAME}-{self.node}" if self.config.merge else self.node


@dataclass(frozen=True)
class TrainedModel:
    """The model that a phase leaves."""

    # Its architecture, with the context length that the phase gave it.
    model: ModelConfig
    # Type of its published weights.
    dtype: Dtype
    # Settings of the adapters, if the phase trained adapters and left the base frozen.
    lora: Lora | None = None
    # Node of the model that the phase began with; empty for random weights.
    base: str = ""
    # True if the phase goes on from a checkpoint of an earlier run.
    continued: bool = False


@dataclass(frozen=True)
class ExportedModel:
    """A model that a recipe exports."""

    # Name of the model, such as base.
    name: str
    # Node of the phase that trained it.
    node: str
    # Step of the phase at which it is exported; None for the last one.
    step: int | None
    trained: TrainedModel
    # A smaller model of `sizes`, of which no model repository is published as of others.
    twin: bool = False

    @property
    def export_node(self) -> str:
        """The node that exports it; `export-…` and `evaluate-…` are of models that a release publishes."""
        return f"{self.name}-export" if self.twin else f"export-{self.name}"

    @property
    def scores_node(self) -> str:
        """The node that evaluates it on held-out documents."""
        return f"{self.name}-scores" if self.twin else f"evaluate-{self.name}"


def published_dtype(model: ModelConfig, padded_vocab_size: int, precision: str) -> Dtype:
    """Returns the type in which a model is published that was trained in `precision`."""
    is_small = model.parameters(padded_vocab_size)["total"] <= FP32_PARAMETERS
    return "float32" if precision == "fp32" and is_small else "bfloat16"


def training_config(model: ModelConfig, section: object, padded_vocab_size: int, seed: int) -> dict[str, Any]:
    """Returns the settings that all training stages have in common."""
    return {"model": model, "phase": section, "padded_vocab_size": padded_vocab_size, "seed": seed}


def import_node(start: StartFrom, imported: TrainedModel, padded_vocab_size: int, is_published: bool) -> NodeSpec:
    """Returns the node that imports a published model.

    Args:
        start: The section `start_from`.
        imported: The model that it must be.
        padded_vocab_size: Rows of the embedding matrix.
        is_published: True if the release exports it as it is, since no pre-training follows.
    """
    dtype = imported.dtype if is_published else None
    expected = {"model": imported.model, "padded_vocab_size": padded_vocab_size, "dtype": dtype}
    return NodeSpec("import", "import", start.model_dump() | expected)


def phase_nodes(
    phases: Sequence[TextPhase],
    model: ModelConfig,
    imported: TrainedModel | None,
    continued: Mapping[str, Checkpoint],
    padded_vocab_size: int,
    seed: int,
) -> tuple[list[NodeSpec], dict[str, TrainedModel]]:
    """Returns the nodes of the phases, each with the order of its documents, and the model after each phase by node.

    Args:
        phases: The phases in order. Each begins with the model that the previous one left.
        model: The section `model`.
        imported: The published model that the first phase begins with; None for random weights.
        continued: By phase, the checkpoint of an earlier run from which it continues.
        padded_vocab_size: Rows of the embedding matrix.
        seed: Seed of the recipe.
    """
    specs: list[NodeSpec] = []
    trained: dict[str, TrainedModel] = {}
    base = ""
    if imported:
        base, trained["import"] = "import", imported
    for phase in phases:
        name, section, checkpoint = phase.node, phase.config, continued.get(phase.node)
        # Only phases of long_context lengthen the context. Others may use shorter rows than the model can read.
        longest = section.sequence_length if phase.where.startswith("long_context") else model.context_length
        model = model.with_rope(section.rope, longest)
        if checkpoint:
            section = section.model_copy(update={"continue_from": str(checkpoint)})
        order = {
            "phase": name,
            "mix": section.mix,
            "sequence_length": section.sequence_length,
            "steps": section.steps,
            "rows": section.rows_of(section.steps),
            "ramp": section.row_ramp,
            "pack": section.pack,
            "long_documents": section.long_documents,
            "seed": seed,
            "first_step": section.first_step,
        }
        inputs = {"tokens": "tokenize", "order": f"order-{name}"}
        if base:
            inputs["init"] = base
        # What is made of the checkpoints afterwards does not enter the key of the phase.
        trained_section = section.model_copy(update={"merge": None})
        training = training_config(model, trained_section, padded_vocab_size, seed)
        specs.append(NodeSpec(f"order-{name}", "order", order, {"tokens": "tokenize"}, checkpoint))
        specs.append(NodeSpec(name, phase.stage, training, inputs, checkpoint))
        dtype = published_dtype(model, padded_vocab_size, section.precision)
        trained[name] = TrainedModel(model, dtype, section.adapter, base, continued=checkpoint is not None)
        base = phase.result
        if section.merge:
            steps = section.last_release_steps(section.merge.last)
            merged = {"phase": name, "steps": steps, "model": model, "padded_vocab_size": padded_vocab_size}
            specs.append(NodeSpec(base, merge.NAME, merged, {"checkpoint": name}))
            trained[base] = trained[name]
    return specs, trained


def problems(phases: Sequence[TextPhase]) -> Iterator[str]:
    """Yields a sentence for each phase that cannot carry over the optimizer of the phase before it."""
    for previous, phase in zip([None, *phases], phases, strict=False):
        if phase.config.optimizer_state == "fresh":
            continue
        where = f"{phase.where}.optimizer_state = carried"
        if previous is None:
            yield f"{where}, and no phase comes before whose optimizer could be carried over; leave it out"
            continue
        before, now = previous.config, phase.config
        if before.merge:
            yield (
                f"{where}, and {previous.where}.merge averages weights, for which no optimizer state exists; leave out "
                "one of the two"
            )
        if before.optimizer.kind != now.optimizer.kind:
            yield (
                f"{where}, and {previous.where} trains with the optimizer {before.optimizer.kind}, whose states "
                f"{now.optimizer.kind} does not have; use one kind, or leave optimizer_state out"
            )
        if before.adapter != now.adapter:
            yield (
                f"{where}, and {phase.where}.lora trains other tensors than {previous.where}; leave out one of the two"
            )


def size_nodes(
    models: smaller_model.Sizes, model: ModelConfig, pretrain: PhaseConfig | None, padded_vocab_size: int, seed: int
) -> tuple[list[NodeSpec], list[ExportedModel]]:
    """Returns the nodes of the smaller models, which read the order of pre-training, and the twins among them."""
    specs, twins = [], []
    inputs = {"tokens": "tokenize", "order": "order-pretrain"}
    for number, size in enumerate(models):
        assert pretrain is not None  # sizes.problems() refuses sizes without pre-training
        smaller, phase = size.resolve(model, pretrain)
        name = smaller_model.node(number)
        training = training_config(smaller, phase, padded_vocab_size, seed) | {"name": name}
        specs.append(NodeSpec(name, smaller_model.NAME, training, inputs))
        if size.twin:
            trained = TrainedModel(smaller, published_dtype(smaller, padded_vocab_size, phase.precision))
            twins.append(ExportedModel(name, name, None, trained, twin=True))
    return specs, twins


def student_node(
    size: smaller_model.SmallerModel,
    number: int,
    model: ModelConfig,
    pretrain: PhaseConfig,
    sft: SftPhase,
    optimizer: Optimizer | None,
    padded_vocab_size: int,
    seed: int,
) -> tuple[NodeSpec, TrainedModel]:
    """Returns the node in which a smaller model is fine-tuned on the rows of `sft` in their order, and its model.

    Args:
        size: The smaller model.
        number: Its place in the section `sizes`, from 0.
        model: The section `model`.
        pretrain: Section of pre-training.
        sft: Section of supervised fine-tuning.
        optimizer: Optimizer of the student; None for that of `sft`.
        padded_vocab_size: Rows of the embedding matrix.
        seed: Seed of the recipe.
    """
    smaller, _ = size.resolve(model, pretrain)
    smaller = smaller.with_rope(sft.rope, smaller.context_length)
    changes: dict[str, Any] = {"release_checkpoint_interval": sft.steps, "parallelism": size.parallelism}
    changes |= {"release_checkpoint_steps": (), "merge": None, "optimizer_state": "fresh"}
    changes |= {"optimizer": optimizer} if optimizer else {}
    fields = {name: value for name, value in sft if name in PhaseConfig.model_fields}
    training = training_config(smaller, PhaseConfig.model_validate(fields | changes), padded_vocab_size, seed)
    inputs = {"tokens": "tokenize", "order": "order-sft", "init": smaller_model.node(number)}
    name = smaller_model.STUDENT
    trained = TrainedModel(smaller, published_dtype(smaller, padded_vocab_size, sft.precision))
    return NodeSpec(name, smaller_model.NAME, training | {"name": name}, inputs), trained
