"""The stand-ins compute what their docstrings say, by a second implementation: the project's simulated FP8, autograd,
PyTorch's AdamW. They run in an interpreter of their own (`python -m tests.te hopper tests.te.kernels`)."""

from __future__ import annotations

import json

import pytest

from tests.fixtures import layout_fixtures
from tests.te.conftest import Spawn


@pytest.mark.parametrize("name", ["hopper", "blackwell"])
def test_the_stand_ins_compute_what_they_say(device: Spawn, name: str) -> None:
    device(name)
    codes, logs = layout_fixtures.end(layout_fixtures.spawn("tests.te.kernels", [], 1))
    assert codes == [0], logs[0][-3000:]
    differences = json.loads(logs[0].splitlines()[-1])
    assert len(differences) == 60
    bounds = {"exact": 0.0, "bf16": 1.0}
    above = {name: x for name, x in differences.items() if not x <= bounds.get(name.split()[0], 1e-5)}
    assert above == {}
