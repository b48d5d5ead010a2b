"""What a layer keeps less in 8 bits is what the plan says. It runs in an interpreter of its own (`tests.te.saved`)."""

from __future__ import annotations

import json

import pytest

from tests.fixtures import layout_fixtures
from tests.te.conftest import Spawn


@pytest.mark.parametrize("name", ["hopper", "blackwell"])
def test_a_layer_keeps_the_inputs_of_its_matrices_in_8_bits(device: Spawn, name: str) -> None:
    device(name)
    precisions = {"hopper": ["fp8-tensorwise", "fp8-blockwise"], "blackwell": ["mxfp8"]}[name]
    codes, logs = layout_fixtures.end(layout_fixtures.spawn("tests.te.saved", precisions, 1))
    assert codes == [0], logs[0][-3000:]
    differences = json.loads(logs[0].splitlines()[-1])
    assert len(differences) == 3 * len(precisions)
    for kind, (measured, planned) in differences.items():
        # without blocks there is one scale, and not a part of one for each number
        expected = planned * 32 / 31 if kind.endswith("tensorwise") else planned
        assert measured == pytest.approx(expected, rel=0.01), kind
