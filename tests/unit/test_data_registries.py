"""Readers and filters: each is one class and one line of a registry, and its code is in the digest of its stage."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import get_args

import pytest

from pipeline.core.source_code import code_digests
from stages.data.acquire import acquire_stage, readers
from stages.data.acquire.readers.base import Reader
from stages.data.curate import filter_stage, filters
from stages.data.curate.filters.base import Filter

CASES = [
    pytest.param(readers, "READERS", Reader, "reader", id="readers"),
    pytest.param(filters, "FILTERS", Filter, "step", id="filters"),
]
SOURCE = {"name": "notes", "kind": "prose", "license": "MIT", "license_evidence": "LICENSE", "origin": "test"}


def classes_with(package: ModuleType, base: type) -> set[str]:
    """The complete subclasses of `base` that the modules of a package define, as `module:class`."""
    classes = set()
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, kind in inspect.getmembers(import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and issubclass(kind, base) and not inspect.isabstract(kind):
                classes.add(f"{info.name}:{name}")
    return classes


@pytest.mark.parametrize(("package", "registry_name", "base", "field"), CASES)
def test_every_class_is_registered_under_its_name(
    package: ModuleType, registry_name: str, base: type, field: str
) -> None:
    registry: Mapping[str, str] = getattr(package, registry_name)
    place = f"{registry_name} of {Path(str(package.__file__)).parent.name}/__init__.py"
    classes = classes_with(package, base)
    unregistered = sorted(classes - set(registry.values()))
    assert unregistered == [], f"{place} lacks {unregistered}; add a line for each"
    assert sorted(set(registry.values()) - classes) == [], f"{place} names a class that is not in the folder"
    for name, kind in registry.items():
        names = get_args(resolve_name(kind).model_fields[field].annotation)
        assert names == (name,), f"{place} calls {kind} {name}, but its field `{field}` is one of {names}"


def test_the_code_of_a_source_is_that_of_its_reader() -> None:
    """A change of another reader, or a new one, makes no artifact of this one stale."""
    reader = {"reader": "hub", "repo": "a/b", "pattern": "*", "format": "jsonl", "path": "."}
    config = acquire_stage.AcquireConfig.model_validate({"source": {**SOURCE, "reader": reader}, "seed": 0})
    code = code_digests(acquire_stage.__name__, acquire_stage.STAGE.code(config))
    used = {name for name in code if name.startswith("stages.data.acquire.readers")}
    assert {f"stages.data.acquire.readers.{name}" for name in ("base", "hub", "row_files")} <= used
    assert used.isdisjoint(
        {
            "stages.data.acquire.readers",
            "stages.data.acquire.readers.web_pages",
            "stages.data.acquire.readers.procedural",
        }
    )
    assert "stages.graph" not in code and "stages.data.recipe" not in code


def test_the_code_of_filter_is_that_of_its_steps() -> None:
    def code(*steps: object) -> set[str]:
        source = {"name": "notes", "kind": "prose", "steps": steps}
        config = filter_stage.FilterConfig.model_validate({"sources": [source], "curation": {}, "seed": 0})
        return {
            name for name in code_digests(filter_stage.__name__, filter_stage.STAGE.code(config)) if ".filters." in name
        }

    base = {"stages.data.curate.filters.base"}
    block = {f"stages.data.curate.filters.{name}" for name in ("block", "accelerated")}
    language = {"stages.data.curate.filters.own"}
    assert code() == base
    assert code({"block": "datatrove.pipeline.filters.RegexFilter"}) == base | block
    assert code({"step": "language"}) == base | language
