"""The recipe of a release: one field per section, in the order in which the model is made.

Nothing in the section `release.maker`, which has what only the maker of a release knows, enters a key. Each of its
fields that is left out is published as "not stated".
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.bounds import (
    MOST_SOURCES,
    Flag,
    Language,
    License,
    Line,
    LongLine,
    Namespace,
    Range,
    Seed,
    SourceName,
    Text,
    Words,
)
from pipeline.core.stage import Config, added, operational
from pipeline.graph.recipe import Identity
from stages.data.supply import SupplySection
from stages.evaluation.gates import RULES
from stages.evaluation.settings import EvaluationSection
from stages.export.variants.registry import VARIANTS, VariantName
from stages.formats.tokenizer import TokenizerSection
from stages.models.registry import Model
from stages.rl.config import Distillation, DpoPhase, RewardPhase, RlPhase
from stages.rl.preference_pairs import PreferenceSection
from stages.train.config import LongContext, PhaseConfig, SftPhase
from stages.train.imported_weights import StartFrom
from stages.train.nodes import TextPhase
from stages.train.rehearsal import RehearsalSection
from stages.train.smaller_model import Sizes

Category = Literal["public", "licensed", "third-party", "crawled", "user", "synthetic", "other"]
"""The kinds of data of the EU's template: sections 2.1 to 2.6."""


def _date(value: str) -> str | None:
    """Returns the reason why a value is no date; None if it is one."""
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return "is no date of the calendar; use such as 2026-08-02"
    return None


Date = Annotated[str, Words(10, "date, such as 2026-08-02", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", test=_date)]


class Carbon(Config):
    """The factor from energy to carbon dioxide."""

    grams_per_kwh: Annotated[float, Range(0, 2000, "g CO2e per kWh; coal: about 1,000")]
    """carbon intensity of the electricity, in grams of CO2 equivalent per kWh"""
    source: Text
    """who publishes this factor, of which grid and year"""
    overhead: Annotated[float, Range(1, 10, "PUE of data centers: 1.1 to 2")] = 1.0
    """power usage effectiveness: all energy of the site for each unit of the machines"""


class Crawler(Config):
    """Behavior of the provider's crawler, which collected the crawled sources."""

    name: Line
    """name or user agent of the crawler"""
    purpose: Text
    """purpose of the crawler"""
    behavior: Text
    """how it treats robots.txt, logins and paywalls"""
    period: Line
    """first and last month of collection"""
    content: Text | None = None
    """the types of content and of online sources, in words"""


class Maker(Config):
    """Statements of the maker, published as such; null: not stated."""

    provider: Line | None = None
    """legal name of the provider"""
    address: LongLine | None = None
    """postal address and contact of the provider"""
    representative: LongLine | None = None
    """authorized representative in the EU, if the provider is established elsewhere"""
    market_date: Date | None = None
    """date of placement on the market of the EU"""
    continuous_training: Flag | None = None
    """whether the model is trained further on data collected after its release"""
    characteristics: Text | None = None
    """characteristics of the training data that no file states, such as regions or groups"""
    code_of_practice: Flag | None = None
    """whether the provider signed the EU's code of practice for general-purpose AI"""
    rights_reservations: Text | None = None
    """measures that respect reservations of rights against text and data mining"""
    illegal_content: Text | None = None
    """measures against illegal content in the training data"""
    user_data: Text | None = None
    """whether data of users was used for training, and which"""
    user_interactions: tuple[Literal["model", "services"], ...] | None = Field(None, max_length=2)
    """what the sources whose category is user come from: interactions with the model, or with services"""
    comments: Text | None = None
    """further information for the EU summary"""
    crawler: Crawler | None = None
    """the crawler of the sources whose category is crawled"""
    sources: dict[SourceName, Category] = Field(default_factory=dict, max_length=MOST_SOURCES)
    """category of sources in the EU summary; without an entry it follows from reader and origin"""
    technical_report: LongLine | None = None
    """address of a technical report"""
    research_paper: LongLine | None = None
    """address of a research paper"""
    carbon: Carbon | None = None
    """factor from energy to carbon; null: no carbon is computed"""


class Licenses(Config):
    """Licenses of a release, as SPDX expressions. Documents keep their own licenses."""

    weights: License
    """license of the model weights"""
    data_compilation: License
    """license of the selection and arrangement of the documents"""
    code: License
    """license of the code and the evidence"""


class ReleaseSection(Config):
    """Metadata of the model and dataset cards."""

    license: Licenses
    """licenses of weights, data and code"""
    namespace: Namespace = "local"
    """user or organization on the Hugging Face Hub"""
    title: Line | None = None
    """heading of the cards; null: the name of the recipe"""
    contact: Line | None = None
    """URL or address for questions and removal requests"""
    variants: Annotated[tuple[VariantName, ...], Field(max_length=len(VARIANTS))] = added(())
    """further forms of the final model's weights, each in its own repository with its measured loss of quality"""
    languages: tuple[Language, ...] = Field(min_length=1, max_length=200)
    """ISO 639 language codes for the metadata of the cards"""
    by_reference: Annotated[tuple[SourceName, ...], Field(max_length=MOST_SOURCES)] = added(())
    """sources whose texts are not published, because their size or license does not allow it: the release has only
    origin and hash of each document, from which `atom rebuild-data` restores the texts"""
    publish_generated: Annotated[dict[SourceName, Line], Field(max_length=MOST_SOURCES)] = added({})
    """why the texts of a source may be published that a model wrote from a source by reference; without a reason,
    the recipe is refused"""
    maker: Maker = added(Maker.model_validate({}))
    """statements of the maker for the documents in standard formats; none by default"""

    @field_validator("variants")
    @classmethod
    def _distinct(cls, names: tuple[VariantName, ...]) -> tuple[VariantName, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"variants names {name} twice; leave one of them out")
        return names


class ReleaseRecipe(Identity):
    """A release. Phases whose section is left out are not trained."""

    training_seed: Seed | None = added(None)
    """seed of initial weights, orders, and the tasks and answers of training, so that recipes with one corpus may
    differ in it; null: seed"""
    tokenizer: TokenizerSection
    """training of the tokenizer"""
    start_from: StartFrom | None = added(None)
    """published model from whose weights training starts, with its tokenizer; null: initial weights"""
    model: Model
    """architecture of the model"""
    pretrain: PhaseConfig | None = added(None)
    """pretraining; null, only with start_from: none"""
    midtrain: PhaseConfig | None = added(None)
    """mid-training; null, only with start_from: none"""
    long_context: LongContext = ()
    """mid-training phases on longer and longer rows, in order"""
    sft: SftPhase | None = None
    """supervised fine-tuning; null: none"""
    rlvr: RlPhase | None = None
    """reinforcement learning with verifiable rewards; null: none"""
    preferences: PreferenceSection | None = added(None)
    """pairs of answers that others ordered, from files; null: none"""
    dpo: DpoPhase | None = None
    """direct preference optimization; null: none"""
    reward_model: RewardPhase | None = None
    """reward model, trained on the pairs of preferences, or else of dpo; requires one of the two; null: none"""
    online_rlhf: RlPhase | None = None
    """reinforcement learning with the reward model; requires reward_model; null: none"""
    evaluation: EvaluationSection
    """measurements after each phase, and thresholds of the release gates"""
    sizes: Sizes = added(())
    """smaller models of the recipe, pre-trained on the same rows and published beside its model"""
    distillation: Distillation | None = added(None)
    """on-policy distillation of the final model into a smaller one of sizes; requires sft; null: none"""
    rehearsal: RehearsalSection = operational(RehearsalSection())
    """rehearsal of costly phases before they begin"""
    supply: SupplySection = operational(SupplySection())
    """how often sources may be read, and which are taken without a probe"""
    release: ReleaseSection
    """metadata of the model and dataset cards"""

    @model_validator(mode="after")
    def _check_beginning(self) -> ReleaseRecipe:
        for name in ("pretrain", "midtrain"):
            if getattr(self, name) is None and self.start_from is None:
                raise ValueError(
                    f"{name} is missing, and only a recipe with start_from can do without; add the section"
                )
        if self.pretrain is None and self.midtrain is None and self.sft is None:
            raise ValueError("the recipe trains nothing; add one of the sections pretrain, midtrain and sft")
        if self.midtrain is None and self.long_context:
            raise ValueError("long_context lengthens the rows of midtrain; add the section midtrain")
        return self

    @model_validator(mode="after")
    def _check_reward_model(self) -> ReleaseRecipe:
        if self.online_rlhf and self.reward_model is None:
            raise ValueError("online_rlhf learns from the reward model; add the section reward_model")
        if self.reward_model and self.preferences is None and self.dpo is None:
            raise ValueError(
                "reward_model learns from pairs of answers, and there are none; add the section preferences, or dpo"
            )
        if self.online_rlhf and self.dpo is None:
            raise ValueError("online_rlhf goes on with the policy of dpo; add the section dpo")
        stored = self.dpo is not None and self.dpo.stored_pairs is not None
        if stored and self.preferences is None:
            raise ValueError("dpo.stored_pairs has no effect without the section preferences; leave it out, or add it")
        if self.preferences and not (stored or self.reward_model):
            raise ValueError(
                "no phase learns from the pairs of preferences; add reward_model or dpo.stored_pairs, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_waived_gates(self) -> ReleaseRecipe:
        for gate in self.evaluation.waived_gates:
            section = RULES[gate].section
            if not getattr(self, section):
                raise ValueError(
                    f"evaluation.waived_gates names {gate}, which judges {section}, and the recipe has no {section}; "
                    "leave it out"
                )
        return self

    @property
    def text_phases(self) -> list[TextPhase]:
        """The phases that train on text, in order."""
        phases = []
        if self.pretrain is not None:
            phases.append(TextPhase("pretrain", "pretrain", "pretrain", self.pretrain))
        if self.midtrain is not None:
            phases.append(TextPhase("midtrain", "midtrain", "midtrain", self.midtrain))
        for number, section in enumerate(self.long_context):
            phases.append(TextPhase(f"longcontext-{number + 1}", "midtrain", f"long_context.{number}", section))
        if self.sft is not None:
            phases.append(TextPhase("sft", "sft", "sft", self.sft))
        return phases

    @property
    def exported(self) -> dict[str, tuple[str, int | None]]:
        """The exported models, the final one last: name → (node of the phase, step). None is the phase's last step."""
        exported: dict[str, tuple[str, int | None]] = {"base": ("import", None)}
        if self.pretrain is not None:
            exported = {"init": ("pretrain", 0)}
        names = {"pretrain": "base", "midtrain": "mid"}
        for phase in self.text_phases:
            name = names.get(phase.node, phase.node.replace("longcontext", "long"))
            if phase.config.merge:
                # Measured as well, so that the release states what merging gave.
                exported[f"unmerged-{name}"] = (phase.node, None)
            exported[name] = (phase.result, None)
        later = {"rlvr": self.rlvr, "dpo": self.dpo, "online-rlhf": self.online_rlhf}
        return exported | {name: (name, None) for name, section in later.items() if section is not None}

    def replay_mixes(self) -> dict[str, Mapping[str, float]]:
        """The mixes of earlier data that phases of post-training replay, by their location in the recipe."""
        phases = {"rlvr": self.rlvr, "online_rlhf": self.online_rlhf, "distillation": self.distillation}
        return {f"{where}.replay": phase.replay.mix for where, phase in phases.items() if phase and phase.replay}

    def asked_tokens(self) -> dict[str, dict[str, float]]:
        """The tokens that phases read of each source, by phase: those on text, and earlier data that others replay."""
        asked = {}
        for phase in self.text_phases:
            tokens, mix = phase.config.tokens(), phase.config.mix
            asked[phase.node] = {source: share * tokens for source, share in mix.items()}
        sampled = {"rlvr": self.rlvr, "online-rlhf": self.online_rlhf, "distillation": self.distillation}
        for name, section in sampled.items():
            if section and (replay := section.replay):
                tokens = section.steps * replay.rows * replay.sequence_length
                asked[name] = {source: share * tokens for source, share in replay.mix.items()}
        return asked
