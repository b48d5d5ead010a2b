"""The registry of architectures: each has a config and its part in Megatron and transformers, and keeps its contract."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from stages.mcore import architectures
from stages.models.base import ModelConfig
from stages.models.mixture import MixtureConfig
from stages.models.registry import ARCHITECTURES
from tests.fixtures import ROOT

REGISTRY = "stages/models/registry.py"


def test_files_and_registry_name_each_other() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "stages/models").glob("*.py")]
    names = {name for text in texts for name in re.findall(r'architecture: Literal\["(\w+)"\]', text)}
    assert names == set(ARCHITECTURES), f"add a line for {min(names - set(ARCHITECTURES), default='')} to {REGISTRY}"


def test_configs_and_megatron_name_the_same_architectures() -> None:
    assert ARCHITECTURES.keys() == architectures.ARCHITECTURES.keys(), (
        "an architecture has a line in stages/models/registry.py and in stages/mcore/architectures.py"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_states_its_name(name: str) -> None:
    config = ARCHITECTURES[name]
    assert issubclass(config, ModelConfig)
    assert get_args(config.model_fields["architecture"].annotation) == (name,)


@pytest.mark.parametrize("name", [name for name, config in ARCHITECTURES.items() if issubclass(config, MixtureConfig)])
def test_a_mixture_joins_attention_and_experts(name: str) -> None:
    """Right of its attention, the mixture's methods would be hidden, and a layout pass that splits no expert evenly."""
    bases = [base for base in ARCHITECTURES[name].__mro__ if "split_sizes" in vars(base)]
    attention = [base for base in bases if not issubclass(base, MixtureConfig) and base is not ModelConfig]
    assert all(bases.index(MixtureConfig) < bases.index(base) for base in attention)
