"""Cluster profiles as an extension point: one YAML file, found by its name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Needs, Stage
from pipeline.core.store import Store
from pipeline.graph import dag, recipe
from pipeline.graph.dag import Node
from pipeline.graph.run import RunFolder
from pipeline.launch import cluster_profile, slurm
from pipeline.launch.batch_script import RunScripts

SHIPPED = sorted((Path(cluster_profile.__file__).parents[1] / "clusters").glob("*.yaml"))
OURS = """
name: site
power: {watts_per_core: 6}
slurm:
  cpu: {partition: short, minutes: 60}
  train: {partition: long, minutes: 600, tasks_per_node: 4, gpus_per_node: 4}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_each_shipped_profile_loads_by_its_name_and_gives_scripts(path: Path, tmp_path: Path) -> None:
    profile = cluster_profile.load(path.stem)
    assert profile.name == path.stem and profile == cluster_profile.load(str(path))
    if profile.slurm is None:
        assert path.stem == "local"
        return
    run = RunFolder("run", tmp_path / "run")
    for trains in (False, True):
        ranks = profile.slurm.train.tasks_per_node if trains else 1
        stage = Stage("stage", 1, Config, lambda *_: None, ranks=lambda config, ranks=ranks: ranks, trains=trains)  # type: ignore[misc]
        node = Node("stage", stage, Config(), {}, "stage-0")
        text = RunScripts(Store(tmp_path), run, profile.slurm, tmp_path).of_stage(node, []).text()
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_new_file_is_found_without_further_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the package, in the folder of a site, and by its path."""
    packaged = tmp_path / "packaged"
    shutil.copytree(SHIPPED[0].parent, packaged)
    (packaged / "site.yaml").write_text(OURS)
    with monkeypatch.context() as patched:
        patched.setattr(recipe.resources, "files", lambda package: packaged)
        profile = cluster_profile.load("site")
    assert profile.cluster().allocation("pretrain", Needs(8, trains=True)).gpus == 8
    monkeypatch.chdir(tmp_path)  # the root of the repository has a folder `site` after `make site`
    with pytest.raises(RecipeError, match="there is no cluster profile site, neither packaged nor a file"):
        cluster_profile.load("site")


def test_the_device_test_asks_for_a_share_of_the_peak(tmp_path: Path) -> None:
    profile, store = cluster_profile.load("h100-pyxis"), Store(tmp_path)
    graph = dag.compose(recipe.load("atom-smoke"), store)
    assert profile.slurm is not None
    assert slurm._limits(graph, profile).device_test_flops == profile.slurm.device_test_share * 989e12
    no_test = profile.model_copy(update={"slurm": profile.slurm.model_copy(update={"device_test_share": 0.0})})
    assert slurm._limits(graph, no_test).device_test_flops is None
