"""The phases of a recipe that train on text."""

from __future__ import annotations

from dataclasses import dataclass

from stages.recipe import ReleaseRecipe
from stages.train.config import PhaseConfig


@dataclass(frozen=True)
class Phase:
    """A phase that trains on text: the name of its node, the stage that runs it, the location of its section in the
    recipe, and its section."""

    node: str
    stage: str
    where: str
    config: PhaseConfig


def phases(config: ReleaseRecipe) -> list[Phase]:
    """The phases of a recipe that train on text, in order."""
    sections = []
    if config.pretrain is not None:
        sections.append(Phase("pretrain", "pretrain", "pretrain", config.pretrain))
    if config.midtrain is not None:
        sections.append(Phase("midtrain", "midtrain", "midtrain", config.midtrain))
    for number, section in enumerate(config.long_context):
        sections.append(Phase(f"longcontext-{number + 1}", "midtrain", f"long_context.{number}", section))
    if config.sft is not None:
        sections.append(Phase("sft", "sft", "sft", config.sft))
    return sections
