"""The miniatures of the recipes for clusters, whole: on a virtual Slurm cluster, from `atom pin` to a verified release,
against a local Hub with small copies of what they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from release.hub.local import server
from tests.fixtures import miniature_hub, slurm_fixtures
from tests.fixtures.disturbance_fixtures import finished_stages
from tests.fixtures.run_fixtures import at_length, atom

pytestmark = slurm_fixtures.ON_SLURM
HOURS = 1.4


@at_length("miniatures", 3600)
@pytest.mark.timeout(3600 * 3)
@pytest.mark.parametrize("name", ["atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b"])
def test_a_miniature_runs_to_its_release(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    atom(home, "init", "mini", "--from", name, "--miniature", cwd=tmp_path)
    recipe = str(tmp_path / "mini.yaml")
    miniature_hub.write(recipe, tmp_path / "hub")
    cluster = slurm_fixtures.write_profile(tmp_path, forward=["HF_HOME"], array_size=2)
    with server.running(tmp_path / "hub") as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
        atom(home, "pin", recipe, **hub)
        atom(home, "submit", recipe, "--cluster", cluster, **hub)
        stages = slurm_fixtures.until(lambda: finished_stages(home), "an end", HOURS * 3600)
    assert {stage["state"] for stage in stages.values()} == {"sealed"}, stages
    atom(home, "build", recipe, timeout=1800)
    atom(home, "verify", str(home / "releases/mini-0.1.0"), timeout=1800)
