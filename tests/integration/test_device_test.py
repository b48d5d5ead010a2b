"""The test of devices before training, on CPU over gloo, with ranks that are broken in one way each."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from pipeline.core.errors import Failure
from pipeline.launch import device_test
from pipeline.launch.rendezvous import FAILURES, Ranks
from tests.fixtures.run_fixtures import SOAK

RANKS = 3
BREAKS = {
    "sound": ("", None),
    "product": (
        "multiply = torch.Tensor.__matmul__\n"
        "torch.Tensor.__matmul__ = lambda a, b: multiply(a, b) + (torch.arange(b.shape[1]) == 7)",
        "rank 1 on node n1: a product of matrices has a wrong result; have its GPU checked",
    ),
    "numbers": (
        "gather = torch.distributed.all_gather\n"
        "torch.distributed.all_gather = lambda rows, row: gather(rows, row + (torch.arange(len(row)) == 9))",
        "rank 1 on node n1: numbers to or from 3 ranks arrived wrong; have its network checked",
    ),
    "device": (
        "def fail(*_, **__):\n    raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\ntorch.arange = fail",
        "rank 1: node n1 failed the test of devices (RuntimeError: CUDA error: uncorrectable ECC error encountered); "
        "have its GPUs checked",
    ),
    "hang": (
        "import time\ntime.sleep(60)",
        "rank 1 on node n1: a product of matrices did not end within 5 s; have its GPU checked",
    ),
}
"""What is broken in the process of rank 1, and the sentence of rank 0."""


def verdicts(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str, least: float = 0.0) -> list[Failure | None]:
    """The verdict of each rank. A rank that has one announces it, as the job does it."""
    script = folder / "rank"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, runpy, sys\nimport torch\n"
        "from pipeline.launch import device_test\ndevice_test.SECONDS = 5.0\n"
        "numbers = sys.argv[3:]\nos.environ['SLURMD_NODENAME'] = f'n{numbers[0]}'\n"
        f"if numbers[0] == '1':\n    exec({broken!r})\n"
        "rank, size, local_rank, host, port, least = numbers\n"
        "print(json.dumps(device_test.main(int(rank), int(size), int(local_rank), host, int(port), float(least))))\n"
        "sys.stdout.flush()\nos._exit(0)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(device_test.sys, "executable", str(script))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(device_test, "node_name", lambda: f"n{int(threading.current_thread().name)}")
    (folder / FAILURES).touch()
    results: list[Failure | None] = [None] * RANKS

    def follow(rank: int) -> None:
        ranks = Ranks(RANKS, rank, rank, True, folder)
        results[rank] = failure = device_test.check(ranks, least)
        if failure is not None:
            ranks.announce(failure)

    threads = [threading.Thread(target=follow, args=(rank,), name=str(rank)) for rank in range(RANKS)]
    for rank, thread in enumerate(threads):
        (folder / f"started-{rank}").write_text(f"n{rank}\n")
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("name", BREAKS if SOAK else ("numbers",))
def test_a_broken_rank_is_named_with_its_node(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sentence = BREAKS[name]
    verdict, *_ = results = verdicts(tmp_path, monkeypatch, broken)
    if sentence is None:
        assert results == [None] * RANKS
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
        problem = device_test.main(1, 2, 0, "127.0.0.1", 1, 0.0)
    assert problem is not None and problem["rank"] is None
    assert problem["text"].startswith("rank 0 at 127.0.0.1:1 cannot be reached (")
    assert json.dumps(problem) and "RANK" not in os.environ
