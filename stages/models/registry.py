"""The architectures that a recipe's `model` section may name. Adding one is a class and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Tag, TypeAdapter

from pipeline.core.extensions import extend
from pipeline.core.text import shown
from stages.models.base import ModelConfig
from stages.models.deepseek_v3 import DeepseekV3Config
from stages.models.grouped_query import Qwen3Config
from stages.models.mixture import Glm4MoeConfig, Qwen3MoeConfig

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3": Qwen3Config,
    "deepseek_v3": DeepseekV3Config,
    "glm4_moe": Glm4MoeConfig,
}
extend("architectures", ARCHITECTURES, load=True)
DEFAULT = "qwen3_moe"
"""The architecture of a section without `architecture`."""


def _architecture_of(section: Any) -> Any:
    return section.get("architecture", DEFAULT) if isinstance(section, Mapping) else section.architecture


def _known(section: Any) -> Any:
    """Raises ValueError for a section that names no architecture."""
    if not isinstance(section, Mapping | ModelConfig):
        raise ValueError(f"{shown(section)} is not a section with the settings of a model")
    if (name := _architecture_of(section)) not in ARCHITECTURES:
        near = difflib.get_close_matches(str(name)[:100], ARCHITECTURES, 1)
        hint = f"did you mean {near[0]}? Known:" if near else "known:"
        raise ValueError(f"architecture = {shown(name)} is unknown; {hint} {', '.join(ARCHITECTURES)}")
    return section


if TYPE_CHECKING:
    Model = ModelConfig
else:
    Model = Annotated[
        Union[tuple(Annotated[config, Tag(name)] for name, config in ARCHITECTURES.items())],  # noqa: UP007 - computed
        Discriminator(_architecture_of),
        BeforeValidator(_known),
    ]
    """The type of a `model` section: the config class of the architecture that it names."""


def parse(section: Mapping[str, Any]) -> ModelConfig:
    """The model of a section. Raises ValidationError."""
    model: ModelConfig = TypeAdapter(Model).validate_python(section)
    return model
