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

from pipeline.core.code_digests import code_digests
from stages.data import acquire, filter, filters, readers
from stages.data.filters.base import Filter
from stages.data.filters.gopher_quality import GopherQuality
from stages.data.readers.base import Reader

CASES = [
    pytest.param(readers, "READERS", "READER", Reader, "reader", acquire, id="readers"),
    pytest.param(filters, "FILTERS", "FILTER", Filter, "step", filter, id="filters"),
]


def modules_with(package: ModuleType, base: type) -> dict[str, str]:
    """{module: class} of every module of a package that defines a complete subclass of `base`."""
    modules = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, kind in inspect.getmembers(import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and issubclass(kind, base) and not inspect.isabstract(kind):
                modules[info.name] = name
    return modules


@pytest.mark.parametrize(("package", "registry_name", "attribute", "base", "field", "stage"), CASES)
def test_every_module_is_registered_under_its_name(
    package: ModuleType, registry_name: str, attribute: str, base: type, field: str, stage: ModuleType
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


@pytest.mark.parametrize(("package", "registry_name", "attribute", "base", "field", "stage"), CASES)
def test_the_code_of_every_module_is_in_the_digest_of_its_stage(
    package: ModuleType, registry_name: str, attribute: str, base: type, field: str, stage: ModuleType
) -> None:
    """`atom plan` shows a stage as stale when a module that it imports by name has changed."""
    code = code_digests(stage.__name__)
    assert set(getattr(package, registry_name).values()) <= set(code)
    assert "stages.graph" not in code and "stages.data.recipe" not in code


def test_a_removal_states_the_value_and_the_threshold() -> None:
    removal = GopherQuality(step="gopher_quality").function()("Too short.")
    assert (removal.reason, removal.value, removal.threshold) == ("gopher_short_doc", 2, 50)  # type: ignore[union-attr]
