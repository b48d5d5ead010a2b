"""Readers and filters: each is one file and one line of a registry, and its code is in the digest of its stage."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from pipeline.core.source_code import code_digests
from stages.data import acquire, filter, filters, readers
from stages.data.filters.base import Filter
from stages.data.readers.base import Reader

CASES = [
    pytest.param(readers, "READERS", "READER", Reader, "reader", id="readers"),
    pytest.param(filters, "FILTERS", "FILTER", Filter, "step", id="filters"),
]
SOURCE = {"name": "notes", "kind": "prose", "license": "MIT", "license_evidence": "LICENSE", "origin": "test"}


def modules_with(package: ModuleType, base: type) -> dict[str, str]:
    """{module: class} of every module of a package that defines a complete subclass of `base`."""
    modules = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, kind in inspect.getmembers(import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and issubclass(kind, base) and not inspect.isabstract(kind):
                modules[info.name] = name
    return modules


@pytest.mark.parametrize(("package", "registry_name", "attribute", "base", "field"), CASES)
def test_every_module_is_registered_under_its_name(
    package: ModuleType, registry_name: str, attribute: str, base: type, field: str
) -> None:
    registry: Mapping[str, str] = getattr(package, registry_name)
    place = f"{registry_name} of {Path(str(package.__file__)).parent.name}/__init__.py"
    modules = modules_with(package, base)
    unregistered = sorted(set(modules) - set(registry.values()))
    assert unregistered == [], f"{place} lacks {unregistered}; add a line for each"
    assert sorted(set(registry.values()) - set(modules)) == [], f"{place} names a module that is not in the folder"
    for name, module in registry.items():
        kind = getattr(import_module(module), attribute, None)
        assert kind is not None, f"{module} has no {attribute}; end it with `{attribute} = {modules[module]}`"
        names = get_args(kind.model_fields[field].annotation)
        assert names == (name,), f"{place} calls {module} {name}, but its field `{field}` is one of {names}"


def test_the_code_of_a_source_is_that_of_its_reader() -> None:
    """A change of another reader, or a new one, makes no artifact of this one stale."""
    reader = {"reader": "hub", "repo": "a/b", "pattern": "*", "format": "jsonl", "path": "."}
    config = acquire.AcquireConfig.model_validate({"source": {**SOURCE, "reader": reader}, "seed": 0})
    code = code_digests(acquire.__name__, acquire.STAGE.code(config))
    used = {name for name in code if name.startswith("stages.data.readers")}
    assert {f"stages.data.readers.{name}" for name in ("base", "hub", "jsonl", "parquet", "rows")} <= used
    assert used.isdisjoint({"stages.data.readers", "stages.data.readers.warc", "stages.data.readers.problems"})
    assert "stages.graph" not in code and "stages.data.recipe" not in code


def test_the_code_of_filter_is_that_of_its_steps() -> None:
    def code(*steps: object) -> set[str]:
        source = {"name": "notes", "kind": "prose", "steps": steps}
        config = filter.FilterConfig.model_validate({"sources": [source], "curation": {}, "seed": 0})
        return {name for name in code_digests(filter.__name__, filter.STAGE.code(config)) if ".filters." in name}

    base = {"stages.data.filters.base"}
    block = {f"stages.data.filters.{name}" for name in ("block", "accelerated")}
    language = {"stages.data.filters.language"}
    assert code() == base
    assert code({"block": "datatrove.pipeline.filters.RegexFilter"}) == base | block
    held = {"step": "by_language", "rules": {"en": [{"block": "datatrove.pipeline.filters.RegexFilter"}]}}
    assert code(held) == base | block | language | {"stages.data.filters.by_language"}
