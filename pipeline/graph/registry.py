"""Registers the graph of the engine: the module that defines its stages, its recipe and its edges.

The module is imported at its first use; its import must stay cheap (no torch, datatrove, MLflow).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.core.stage import Config, Stage
from pipeline.core.store import Store

DEFINITION = "stages.graph"
# Modules with commands of `atom` beside the engine's, each as `app`. Importing one must stay cheap, too.
COMMANDS = ("stages.commands", "release.commands")


class Definition(Protocol):
    """The contents of that module."""

    # The module of each stage by name, and after a colon its name there if that is not STAGE.
    STAGES: dict[str, str]
    # The classes of a recipe and of a data recipe.
    RECIPE: type[Config]
    DATA_RECIPE: type[Config]

    # Their types are those of `pipeline.graph.dag`, which imports this module.
    def compose(self, recipe: Any, store: Store, without_data: bool) -> Any: ...

    def problems(self, recipe: Any) -> Iterator[str]:
        """Yields a sentence for each contradiction between sections or files; `compose` raises the first."""

    def supply(self, recipe: Any) -> Any:
        """Returns the `pipeline.graph.supply.SourceSupply` of each source that a phase reads."""

    def gates(self, recipe: Any) -> Iterator[Any]:
        """Yields a `pipeline.graph.plan.PlannedGate` for each phase after which a gate is judged."""

    def load_data_recipe(self, content: bytes, path: Path) -> Config:
        """Reads the file that a recipe names as its data."""

    def extension_modules(self, data: Config, path: Path) -> dict[str, bytes]:
        """Returns the Python modules that such a file adds, by their paths."""

    def start_from(self, model: str) -> dict[str, str]:
        """Returns the fields of the section `start_from` for a published model."""

    def miniature(self, recipe: Any, data: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Returns the fields of a recipe and of its data recipe at the size of one machine, and what a CPU lacks."""


@cache
def definition() -> Definition:
    """Returns the registered module."""
    return cast(Definition, importlib.import_module(DEFINITION))


def stages() -> dict[str, str]:
    """Returns {stage: its module}."""
    return definition().STAGES


@cache
def stage(name: str) -> Stage:
    """Returns the stage of that name."""
    module, _, attribute = stages()[name].partition(":")
    registered: Stage = getattr(importlib.import_module(module), attribute or "STAGE")
    assert registered.name == name, f"{stages()[name]} registers itself as {registered.name}"
    return registered
