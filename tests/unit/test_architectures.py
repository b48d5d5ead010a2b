"""The registry of architectures: each file of stages/mcore/architectures with a SPEC is named, and each entry keeps its contract."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import pytest

from stages.models.base import ModelConfig, ModelSpec
from stages.models.grouped_query import GroupedQueryConfig
from stages.models.mixture import RoutedConfig
from stages.models.registry import ARCHITECTURES
from tests.fixtures import ROOT

REGISTRY = "stages/models/registry.py"


def test_files_and_registry_name_each_other() -> None:
    files = (ROOT / "stages/mcore/architectures").glob("*.py")
    specs = {path.stem for path in files if "\nSPEC = " in path.read_text(encoding="utf-8")}
    assert specs - set(ARCHITECTURES) == set(), (
        f"add a line for {min(specs - set(ARCHITECTURES), default='')} to {REGISTRY}"
    )
    assert set(ARCHITECTURES) - specs == set(), f"{REGISTRY} names an architecture without a SPEC for Megatron"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_entry_has_its_config_and_its_spec(name: str) -> None:
    config = ARCHITECTURES[name]
    assert issubclass(config, ModelConfig) and config.__module__ == f"stages.models.{name}"
    assert config.spec_module == f"stages.mcore.architectures.{name}"
    assert get_args(config.model_fields["architecture"].annotation) == (name,)
    assert isinstance(import_module(config.spec_module).SPEC, ModelSpec)


@pytest.mark.parametrize("name", [name for name, config in ARCHITECTURES.items() if issubclass(config, RoutedConfig)])
def test_a_mixture_joins_attention_and_experts(name: str) -> None:
    """Methods of the attention alone would let a layout pass that does not divide the experts."""
    for method in ("split_sizes", "proportions", "describe", "inner_widths", "scaled"):
        module = getattr(ARCHITECTURES[name], method).__module__
        assert module != GroupedQueryConfig.__module__, f"{name}: {method} leaves out the experts; join both there"
