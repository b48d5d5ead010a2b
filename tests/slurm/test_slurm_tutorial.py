"""The tutorial of clusters, typed on a real Slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fixtures import page_fixtures, slurm_fixtures
from tests.fixtures.run_fixtures import at_length

pytestmark = slurm_fixtures.ON_SLURM


@at_length("slurm-stages", 120)
def test_the_tutorial_ends_with_a_sealed_phase(smoke_data: Path, tmp_path: Path) -> None:
    environment = page_fixtures.checkout(tmp_path)
    shutil.copytree(smoke_data, tmp_path / "runs")
    page_fixtures.run(page_fixtures.TUTORIALS / "cluster.md", tmp_path, environment, ("run: on Slurm",))
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(tmp_path / "runs", "pretrain"), "pretrain sealed")
