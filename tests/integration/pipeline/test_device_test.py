"""The test of devices before training, on CPU over gloo, with ranks that are broken in one way each."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

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


def test_a_rank_that_cannot_reach_rank_0_blames_no_node(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_test, "SECONDS", 0.5)
        problem = device_test.main(1, 2, 0, "127.0.0.1", 1, 0.0, tmp_path)
    assert problem is not None and problem["rank"] is None
    assert problem["text"].startswith("rank 0 at 127.0.0.1:1 cannot be reached (")
    assert json.dumps(problem) and "RANK" not in os.environ
