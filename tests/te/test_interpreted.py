"""Transformer Engine's own Triton kernels, interpreted on the CPU, against plain operations; and the NCCL that this
environment's PyTorch loads."""

from __future__ import annotations

import json

import torch

from stages.generation.vllm_worker.atom_group import nccl_version
from tests.fixtures import ROOT, layout_fixtures


def test_kernels_of_permutation_and_cross_entropy() -> None:
    """Two of the fusions that are on by default on a GPU."""
    codes, logs = layout_fixtures.end(
        layout_fixtures.spawn("tests.te.interpreted", [], 1, {"TRITON_INTERPRET": "1"}), timeout=900
    )
    assert codes == [0], logs[0][-3000:]
    differences = json.loads(next(line for line in logs[0].splitlines() if line.startswith("{")))
    assert len(differences) == 6
    for name, difference in differences.items():
        assert difference < (1e-5 if "float32" in name else 2e-2), differences


def test_pytorch_loads_the_nccl_of_the_lock_files() -> None:
    """Which is newer than the one with which it was built."""
    (pinned,) = (line.partition("==")[2] for line in (ROOT / "requirements/overrides.txt").read_text().splitlines() if "==" in line)  # fmt: skip
    assert nccl_version(torch.device("cuda")) == pinned
