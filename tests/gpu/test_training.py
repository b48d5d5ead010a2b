"""Points 4 and 5: the losses of a tiny model are those of a process that sees no GPU, in fp32 and in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import ROOT, gpu_fixtures, layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import SOAK
from tests.gpu.conftest import Report

STEPS = 12
Curve = list[dict[str, Any]]
ON_CPU = """
import json, sys
from pathlib import Path
from tests.fixtures import layout_fixtures
print(json.dumps([layout_fixtures.train(Path(folder), settings, steps) for folder, settings, steps in json.loads(sys.argv[1])]))
"""


def settings(packed: bool, precision: str = "fp32") -> dict[str, Any]:
    return train_fixtures.config(pack=packed, precision=precision)


@pytest.fixture(scope="module")
def corpora(corpus: Path) -> dict[bool, Path]:
    """The corpus with plain rows, and with packed ones."""
    train_fixtures.pack(corpus, {})
    return {False: corpus, True: corpus / "packed"}


@pytest.fixture(scope="module")
def on_cpu(corpora: dict[bool, Path]) -> dict[bool, Curve]:
    """The figures of plain and of packed rows in fp32, of a process that sees no GPU; in `make test` of this process."""
    if not (gpu_fixtures.ON_GPU or SOAK):
        return {packed: layout_fixtures.train(folder, settings(packed), STEPS) for packed, folder in corpora.items()}
    tasks = json.dumps([(str(folder), settings(packed), STEPS) for packed, folder in corpora.items()])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", ON_CPU, tasks], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return dict(zip(corpora, json.loads(process.stdout.splitlines()[-1]), strict=True))


def largest_difference(actual: Curve, expected: Curve) -> float:
    """Of the losses at any step, relative to the expected one."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(actual[:STEPS], expected[:STEPS], strict=True)]
    return max(abs(a - b) / b for a, b in pairs)


@gpu_fixtures.at_length(10)
@pytest.mark.point(4)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_losses_in_fp32_are_those_of_the_cpu(
    corpora: dict[bool, Path], on_cpu: dict[bool, Curve], packed: bool, report: Report
) -> None:
    actual = layout_fixtures.train(corpora[packed], settings(packed), STEPS)
    kind = "packed" if packed else "plain"
    difference = largest_difference(actual, on_cpu[packed])
    report(f"{STEPS} losses in fp32, {kind}", f"relative difference {difference:.1e} from the CPU's", "< 1e-4", difference < 1e-4)  # fmt: skip
    moved = sum(abs(a - b) for a, b in zip(actual[0]["share"], on_cpu[packed][0]["share"], strict=True))
    report(f"shares of the experts at step 1, {kind}", f"differ by {moved:.1e} in sum", "< 1e-6: the same counts", moved < 1e-6)  # fmt: skip


@pytest.mark.point(5)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_losses_in_bf16_are_near_fp32(
    corpora: dict[bool, Path], on_cpu: dict[bool, Curve], packed: bool, report: Report
) -> None:
    actual = layout_fixtures.train(corpora[packed], settings(packed, "bf16"), STEPS)
    difference = largest_difference(actual, on_cpu[packed])
    name = f"{STEPS} losses in bf16, {'packed' if packed else 'plain'}"
    report(name, f"relative difference {difference:.1e} from fp32 on the CPU", "< 1 %", difference < 0.01)
