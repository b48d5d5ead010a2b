"""Training on one GPU: the losses of the first steps are those of the CPU, and a resumed run goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fixtures import train_fixtures

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")


@pytest.fixture(scope="module")
def on_cpu(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a process that sees no GPU."""
    folder = tmp_path_factory.mktemp("cpu")
    process = train_fixtures.fresh(corpus, folder, env={"CUDA_VISIBLE_DEVICES": ""})
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, f"{output}\n{errors}"
    return train_fixtures.losses(folder / "out")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_losses_are_those_of_the_cpu(
    corpus: Path, on_cpu: list[float], tmp_path: Path, precision: str, tolerance: float
) -> None:
    process = train_fixtures.fresh(corpus, tmp_path, precision=precision)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, f"{output}\n{errors}"
    assert train_fixtures.losses(tmp_path / "out")[:5] == pytest.approx(on_cpu[:5], rel=tolerance)


def test_a_run_that_is_stopped_ends_in_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    for name, step in (("calm", 0), ("stopped", 7)):
        process = train_fixtures.fresh(corpus, tmp_path / name, at=step, number=15 if step else 0)
        process.communicate(timeout=500)
    process = train_fixtures.fresh(corpus, tmp_path / "stopped")
    assert "going on after step 7" in "".join(process.communicate(timeout=500))
    calm, stopped = (train_fixtures.losses(tmp_path / name / "out") for name in ("calm", "stopped"))
    assert stopped == pytest.approx(calm, rel=1e-5)
