"""A stage in the CPU image that containers/debootstrap makes, on Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fixtures import ROOT, slurm_fixtures
from tests.fixtures.disturbance_fixtures import finish, signalled_to_save, submit
from tests.fixtures.run_fixtures import at_length

pytestmark = slurm_fixtures.ON_SLURM


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU image; its build ends with the smoke test. ATOM_IMAGE names one that is there already."""
    if "ATOM_IMAGE" in os.environ:
        return Path(os.environ["ATOM_IMAGE"])
    folder = tmp_path_factory.mktemp("image") / "image"
    build = subprocess.run([ROOT / "containers/debootstrap", folder], capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    return folder


@at_length("containers", 900)
@pytest.mark.timeout(3600)
def test_a_stage_in_an_image_is_stopped_and_has_the_bytes_of_one_outside(image: Path, home: Path, calm: str) -> None:
    submit(home, container={"kind": "bubblewrap", "image": str(image), "python": "/opt/atom/venv/bin/python"})
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 6), "a checkpoint")
    for node in slurm_fixtures.nodes_of(home, "pretrain"):
        roots = [Path(f"/proc/{pid}/root") for pid in slurm_fixtures.processes(node, b"submitit.core._submit")]
        assert any((root / "opt/atom/packages.txt").exists() for root in roots), node
    signalled_to_save(home)
    assert finish(home) == calm
    assert slurm_fixtures.attempts(home, "pretrain") == 2
    assert not (image / str(home).lstrip("/")).exists(), "the image stays as it was built"
