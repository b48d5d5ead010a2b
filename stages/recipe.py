"""The recipe of a release: one field per section, top to bottom the story of how the model was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.core.bounds import Language, License, Line, Namespace
from pipeline.core.stage import Config, Renamed
from pipeline.graph.recipe import Identity
from stages.data.tokenizer import TokenizerSection
from stages.evaluation.bits_per_byte import EvaluationSection
from stages.models.qwen3_moe.config import ModelConfig
from stages.rl.config import DpoPhase, RewardPhase, RlPhase
from stages.train.config import LongContext, PhaseConfig


class Licenses(Config):
    """SPDX expressions. Documents keep their own licenses; `data_compilation` is about selection and arrangement."""

    weights: License
    data_compilation: License
    code: License


class ReleaseSection(Config):
    """The recipe's `release`: what stands on the cards and cannot be measured."""

    license: Annotated[Licenses, Renamed("licence")]
    namespace: Namespace = Field("local", description="user or organization on the Hub that the cards name")
    title: Line | None = Field(None, description="heading of the cards; the recipe's name if absent")
    contact: Line | None = Field(None, description="where questions and removal requests go: URL or address")
    languages: tuple[Language, ...] = Field(
        min_length=1, max_length=200, description="ISO 639 codes for the cards' metadata"
    )


class ReleaseRecipe(Identity):
    """A whole release. Sections that may be left out are phases that are then not trained."""

    tokenizer: TokenizerSection
    model: ModelConfig
    pretrain: PhaseConfig
    midtrain: PhaseConfig
    long_context: LongContext = ()
    sft: PhaseConfig | None = None
    rlvr: RlPhase | None = None
    dpo: Annotated[DpoPhase | None, Renamed("rlhf")] = None
    reward_model: Annotated[RewardPhase | None, Renamed("rlhf")] = None
    online_rlhf: Annotated[RlPhase | None, Renamed("rlhf")] = None
    evaluation: EvaluationSection
    release: ReleaseSection

    @model_validator(mode="after")
    def _together(self) -> ReleaseRecipe:
        if (self.reward_model is None) != (self.online_rlhf is None):
            raise ValueError(
                "reward_model and online_rlhf belong together: the one is trained for the other; give both"
            )
        if self.reward_model and self.dpo is None:
            raise ValueError("reward_model learns from the pairs that dpo makes; add the section dpo")
        return self

    def replay_mixes(self) -> dict[str, Mapping[str, float]]:
        """The mixes of earlier data that phases of post-training replay, by where they stand in the recipe."""
        phases = {"rlvr": self.rlvr, "online_rlhf": self.online_rlhf}
        return {f"{where}.replay": phase.replay.mix for where, phase in phases.items() if phase and phase.replay}
