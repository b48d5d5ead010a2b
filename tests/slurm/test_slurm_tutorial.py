"""The tutorial of clusters, typed on a real Slurm."""

from __future__ import annotations

from pathlib import Path

from docs import examples
from tests.fixtures import slurm_fixtures
from tests.fixtures.page_fixtures import TUTORIALS
from tests.fixtures.run_fixtures import at_length

pytestmark = slurm_fixtures.ON_SLURM


@at_length("slurm-stages", 120)
def test_the_tutorial_ends_with_a_sealed_phase(smoke_data: Path, tmp_path: Path) -> None:
    text = (TUTORIALS / "cluster.md").read_text("utf-8")
    with examples.place(tmp_path, smoke_data, examples.SMOKE) as at:
        examples.run("cluster.md", text, at, ("on Slurm",))
        slurm_fixtures.until(lambda: slurm_fixtures.sealed(tmp_path / "runs", "pretrain"), "pretrain sealed")
