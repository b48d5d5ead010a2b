"""The one place where the engine learns which stages and recipe sections exist.

Values are module paths, imported when first asked for; importing them must stay cheap (no torch, datatrove, MLflow).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from pipeline.core.stage import Stage

STAGES = {
    "acquire": "stages.data.acquire",
    "items": "stages.evaluation.eval_set",
    "filter": "stages.data.filter",
    "curate": "stages.data.dedup",
    "tokenizer": "stages.data.tokenizer",
    "tokenize": "stages.data.tokenization",
    "order": "stages.data.order",
    "pretrain": "stages.train.pretrain",
    "midtrain": "stages.train.midtrain",
    "sft": "stages.train.sft",
    "tasks": "stages.rl.rollout.tasks",
    "rlvr": "stages.rl.rlvr",
    "rlhf": "stages.rl.dpo",
    "reward": "stages.rl.reward_model",
    "export": "stages.export.hf",
    "evaluate": "stages.evaluation.bits_per_byte",
    "solve": "stages.evaluation.pass_at_k",
    "fresh": "stages.evaluation.generated_eval",
    "prefer": "stages.evaluation.win_rate",
    "contamination": "stages.evaluation.contamination",
}

SECTIONS = {
    "tokenizer": "stages.data.tokenizer:TokenizerSection",
    "model": "stages.models.qwen3_moe.config:ModelConfig",
    "pretrain": "stages.train.config:PhaseConfig",
    "midtrain": "stages.train.config:PhaseConfig",
    "long_context": "stages.train.config:LongContext",
    "sft": "stages.train.config:PhaseConfig",
    "rlvr": "stages.rl.config:RlPhase",
    "rlhf": "stages.rl.config:RlhfSection",
    "evaluation": "stages.evaluation.bits_per_byte:EvaluationSection",
    "release": "release.assembly.build_release:ReleaseSection",
}

OPTIONAL: dict[str, Any] = {"long_context": (), "sft": None, "rlvr": None, "rlhf": None}
"""Sections that a recipe may leave out, with what then stands there."""

DATA = "stages.data.recipe"


@cache
def stage(name: str) -> Stage:
    """The registered stage of that name."""
    found: Stage = importlib.import_module(STAGES[name]).STAGE
    assert found.name == name, f"{STAGES[name]} registers itself as {found.name}"
    return found


@cache
def section(name: str) -> Any:
    """The config class that owns a recipe section."""
    module, attribute = SECTIONS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def data() -> Any:
    """The module that loads data recipes."""
    return importlib.import_module(DATA)
