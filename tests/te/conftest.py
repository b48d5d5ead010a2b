"""Runs tests' modules with Transformer Engine on the CPU; without its environment, every test of this folder is skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from tests.fixtures import layout_fixtures

MISSING = [name for name in ("transformer_engine_torch", "megatron.bridge") if importlib.util.find_spec(name) is None]
Spawn = Callable[[str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        skip = pytest.mark.skip(reason=f"needs {' and '.join(MISSING)}, on Python 3.13: run by `make test-te`")
        for item in items:
            if "tests/te/" in item.path.as_posix():
                item.add_marker(skip)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Spawn:
    """device(NAME): what layout_fixtures spawns from now on in this test runs there, see `tests.te.__main__`."""
    spawn = layout_fixtures.spawn

    def use(name: str) -> None:
        def spawn_there(module: str, arguments: list[str], *args: Any, **options: Any) -> list[Any]:
            return spawn("tests.te", [name, module, *arguments], *args, **options)

        monkeypatch.setattr(layout_fixtures, "spawn", spawn_there)

    return use
