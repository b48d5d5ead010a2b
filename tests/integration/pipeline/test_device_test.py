"""The test of devices before training, on CPU over gloo, with ranks that are broken in one way each."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.launch import device_test
from pipeline.launch.rendezvous import Ranks
from tests.fixtures.device_test_fixtures import BREAKS, verdicts
from tests.fixtures.run_fixtures import SOAK


@pytest.mark.parametrize("name", BREAKS if SOAK else ("numbers",))
def test_a_broken_rank_is_named_with_its_node(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sentence = BREAKS[name]
    verdict, *_ = results = verdicts(tmp_path, monkeypatch, broken)
    if sentence is None:
        assert results == [None] * 3
    else:
        assert verdict is not None and (verdict.text, verdict.bad_node) == (sentence, "n1")


def test_a_slow_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    failure = device_test.check(Ranks(), 1e18)
    assert failure is not None and failure.bad_node == "n7"
    sentence = r"rank 0 on node n7: a product of matrices reaches \S+ TFLOP/s, and 1e\+06 are the least; have its GPU "
    assert re.fullmatch(sentence + "checked", failure.text)
    assert device_test.check(Ranks(), 1.0) is None


def test_a_rank_that_cannot_reach_rank_0_blames_no_node() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_test, "SECONDS", 0.5)
        problem = device_test.main(1, 2, 0, "127.0.0.1", 1, 0.0, Path("none"))
    assert problem is not None and problem["rank"] is None
    assert problem["text"].startswith("rank 0 at 127.0.0.1:1 cannot be reached (")
    assert json.dumps(problem) and "RANK" not in os.environ


def test_what_a_stranger_reports_is_not_heard() -> None:
    """It could have sound nodes excluded."""
    key = bytes(range(32))
    table = device_test.Table(dist.HashStore(), 2, key)
    table.write(0, "product", None)
    table.write(1, "product", None)
    table.write(0, "wrong", [])
    table.write(1, "wrong", [])
    assert device_test.verdict(table) is None
    for forged in (json.dumps("broken"), "0" * 64 + json.dumps("broken"), "\xff" * 80):
        table.store.set("product-2", forged)
        assert table.get(2, "product") is None
    device_test.Table(table.store, 2, bytes(32)).write(2, "product", "broken")
    assert table.get(2, "product") is None
    table.store.set("product-2", table.store.get("product-1"))
    assert table.get(2, "product") is None, "the report of another rank"
