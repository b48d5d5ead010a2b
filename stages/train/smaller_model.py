"""The recipe's section `sizes`: smaller models of the same recipe, which a release publishes beside its model.

    atom run atom-tiny --until size-1

Each reads the rows of pre-training in their order, so that its losses compare with those of the model step by step, and
anybody can train it again from the published order on a machine that the model would not fit.

A twin is a dense one that needs as many training FLOPs as a model with experts. It is the baseline of experts, and so
it is exported and evaluated as the model after pre-training is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.core.bounds import Flag, Settings, Words
from pipeline.core.stage import Config, Inputs, Report, added, operational
from stages.mcore.optimizer import Optimizer
from stages.models.base import ModelConfig
from stages.models.grouped_query import Qwen3Config
from stages.models.parallel_layout import Layout
from stages.models.registry import ARCHITECTURES, DEFAULT, parse
from stages.train import pretrain
from stages.train.config import PhaseConfig, TrainConfig

NAME = "size"
"""The stage, and the first part of the names of its nodes: size-1, size-2, …"""
STUDENT = "student"
"""The node of a smaller model's supervised fine-tuning, before it is distilled into."""
VERSION = 2
TWIN_TOLERANCE = 0.02
"""Largest difference of a twin's training FLOPs from those of the model, as a part of these."""


class SmallerModel(Config):
    """A smaller model of the recipe, pre-trained on the same rows in the same order."""

    model: Settings
    """the settings of the section model that differ"""
    optimizer: Optimizer | None = added(None)
    """optimizer and its learning-rate schedule; null: as in pretrain"""
    twin: Flag = added(False)
    """require a dense model with the training FLOPs of the model, within 2 %, and evaluate it beside the base model"""
    parallelism: Layout = operational(Layout())
    """distribution of its training over processes"""

    def resolve(self, model: ModelConfig, phase: PhaseConfig) -> tuple[ModelConfig, PhaseConfig]:
        """The model, and the phase that trains it: that of pre-training, with checkpoints of its first and last step.

        Raises ValidationError for settings that the architecture refuses.
        """
        whole = model.with_rope(phase.rope, model.context_length)
        smaller = with_settings(whole.model_dump(mode="json"), self.model)
        changes: dict[str, Any] = {"release_checkpoint_interval": phase.steps, "parallelism": self.parallelism}
        changes |= {"release_checkpoint_steps": (), "merge": None}
        if self.optimizer is not None:
            changes["optimizer"] = self.optimizer
        return smaller, phase.model_copy(update=changes)


def with_settings(model: Mapping[str, Any], settings: Mapping[str, Any]) -> ModelConfig:
    """Returns the model of a section with some settings replaced; another architecture keeps those that it has, too.

    Raises ValidationError for settings that the architecture refuses.
    """
    name = settings.get("architecture", model.get("architecture", DEFAULT))
    fields = ARCHITECTURES[name].model_fields if name in ARCHITECTURES else model
    return parse({key: value for key, value in model.items() if key in fields} | dict(settings))


Sizes = Annotated[tuple[SmallerModel, ...], Field(max_length=16)]


def node(number: int) -> str:
    """The name of the node, and of the phase, of the size at a place of the section, from 0."""
    return f"{NAME}-{number + 1}"


def problems(
    sizes: Sizes, model: ModelConfig, phase: PhaseConfig | None, vocabulary: int, is_random: bool
) -> Iterator[str]:
    """A sentence for each contradiction between the section and those of the model and of pre-training.

    is_random: pre-training begins with random weights.
    """
    if not sizes:
        return
    if phase is None:
        yield "sizes are trained on the rows of pretrain, which the recipe does not have; leave sizes out"
        return
    if not is_random:
        yield (
            "sizes begin with random weights, and pretrain with those of start_from, so that their losses do not "
            "compare; leave sizes out"
        )
        return
    if phase.continue_from:
        yield (
            "sizes begin with the first step of pretrain, and pretrain.continue_from leaves earlier ones out; publish "
            "them with the earlier run"
        )
        return
    whole = model.parameters(vocabulary)["total"]
    for number, size in enumerate(sizes):
        try:
            smaller, _ = size.resolve(model, phase)
        except ValidationError as error:
            row = error.errors()[0]
            place = ".".join(["sizes", str(number), "model", *(str(part) for part in row["loc"][1:])])
            yield f"{place}: {row['msg']}; correct it, as in the section model"
            continue
        if (total := smaller.parameters(vocabulary)["total"]) >= whole:
            yield f"sizes.{number} has {total} parameters, and the model {whole}; name settings that make it smaller"
        elif size.twin and phase.merge:
            yield (
                f"sizes.{number}.twin is compared with the base model, which pretrain.merge averages and a twin does "
                "not; leave out one of them"
            )
        elif size.twin:
            yield from _problems_of_twin(f"sizes.{number}", smaller, model, vocabulary, phase.sequence_length)


def _problems_of_twin(
    place: str, twin: ModelConfig, model: ModelConfig, vocabulary: int, sequence_length: int
) -> Iterator[str]:
    if not isinstance(twin, Qwen3Config) or model.routing is None:
        yield f"{place}.twin = true is for a model of architecture qwen3 beside one with experts; leave twin out"
        return
    if twin.context_length != model.context_length:
        yield (
            f"{place} has a context of {twin.context_length} tokens and the model one of {model.context_length}, so "
            "they would be scored on other bytes; make them equal"
        )
        return
    flops, of_model = (each.flops_per_token(vocabulary, sequence_length) for each in (twin, model))
    if abs(flops / of_model - 1) > TWIN_TOLERANCE:
        wider = twin.model_copy(update={"intermediate_size": twin.intermediate_size + 1})
        by_width = wider.flops_per_token(vocabulary, sequence_length) - flops
        nearest = max(1, twin.intermediate_size + round((of_model - flops) / by_width))
        yield (
            f"{place} needs {flops / 1e9:.4g} GFLOP for a token and the model {of_model / 1e9:.4g}; those of a twin "
            f"differ by at most {TWIN_TOLERANCE:.0%}; nearest: intermediate_size = {nearest}"
        )


class SizeConfig(TrainConfig):
    """Config of the training of a smaller model."""

    name: Annotated[str, Words(20, "name such as size-1", f"{NAME}-[1-9][0-9]?|{STUDENT}")]
    """name of the phase"""


def run(config: TrainConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains a smaller model on the order of pre-training, or a student on that of supervised fine-tuning.

    inputs["tokens"], inputs["order"], inputs["init"], `work` and `out` are as there. Raises what
    stages.train.trainer.train raises.
    """
    from stages.train.text_trainer import TextTrainer
    from stages.train.trainer import train

    assert isinstance(config, SizeConfig), "the stage's class of configs"
    train(TextTrainer, config.name, config, inputs, work, out, report)


STAGE = replace(pretrain.STAGE, name=NAME, version=VERSION, config=SizeConfig, run=run)
