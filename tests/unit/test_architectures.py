"""The registry of architectures: each folder of stages/models is named, and each entry keeps its contract."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import pytest

from stages.models.base import ModelConfig, ModelSpec
from stages.models.registry import ARCHITECTURES
from tests.fixtures import ROOT

REGISTRY = "stages/models/registry.py"


def test_folders_and_registry_name_each_other() -> None:
    folders = {path.parent.name for path in (ROOT / "stages/models").glob("*/config.py")}
    assert folders - set(ARCHITECTURES) == set(), (
        f"add a line for stages/models/{min(folders - set(ARCHITECTURES), default='')} to {REGISTRY}"
    )
    assert set(ARCHITECTURES) - folders == set(), f"{REGISTRY} names an architecture without a folder in stages/models"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_entry_has_its_config_and_its_spec(name: str) -> None:
    config = ARCHITECTURES[name]
    assert issubclass(config, ModelConfig) and config.__module__ == f"stages.models.{name}.config"
    assert config.spec_module == f"stages.models.{name}.spec"
    assert get_args(config.model_fields["architecture"].annotation) == (name,)
    assert isinstance(import_module(config.spec_module).SPEC, ModelSpec)
