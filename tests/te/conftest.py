"""Runs tests' modules with Transformer Engine on the CPU; without its environment, every test of this folder is skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.fixtures import layout_fixtures

MISSING = [name for name in ("transformer_engine_torch", "megatron.bridge") if importlib.util.find_spec(name) is None]
Spawn = Callable[[str], None]
SPAWN = layout_fixtures.spawn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items = [item for item in items if "tests/te/" in item.path.as_posix()]
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # what they spawn has limits, longer where cores are busy
        if MISSING:
            reason = f"needs {' and '.join(MISSING)}, on Python 3.13: run by `make test-te`"
            item.add_marker(pytest.mark.skip(reason=reason))


def spawn_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What layout_fixtures spawns from now on runs on that device, see `tests.te.__main__`. It writes the bytecode of
    four thousand modules, which every process would otherwise compile again, for half a minute of the processor."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)

    def spawn(module: str, arguments: list[str], *args: Any, **options: Any) -> list[Any]:
        return SPAWN("tests.te", [name, module, *arguments], *args, **options)

    monkeypatch.setattr(layout_fixtures, "spawn", spawn)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Spawn:
    """device(NAME): what layout_fixtures spawns from now on in this test runs there."""
    return partial(spawn_on, monkeypatch)
