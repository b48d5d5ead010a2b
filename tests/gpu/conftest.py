"""The points of the kit: a test's marker `point` gives its number, and what a test does not report itself, a failure or
the reason why it needs a GPU, is recorded for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.fixtures import gpu_fixtures, train_fixtures

Report = Callable[[str, str, str, bool], None]
"""(name, figure, criterion, whether it holds)"""


def _point(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("point")
    return marker.args[0] if marker else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    result = yield
    point = _point(item)
    if point is not None and call.excinfo is not None:
        error = call.excinfo.value
        if result.skipped:
            gpu_fixtures.record(point=point, name=item.name.removeprefix("test_").replace("_", " "), skipped=str(error))
        elif "DOES NOT HOLD" not in str(error):  # such a line is recorded already
            text = " ".join(str(error).split())[:300]
            gpu_fixtures.record(point=point, name=item.name.removeprefix("test_").replace("_", " "), figure=f"{call.excinfo.typename}: {text}",
                                criterion="no error", holds=False)  # fmt: skip
    return result


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    point = _point(request.node)
    assert point is not None, "a test that reports has a marker `point`"
    return partial(gpu_fixtures.report, point)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    return folder
