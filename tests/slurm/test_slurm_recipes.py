"""Slurm judges every script of the recipes for clusters: the test cluster declares the partitions, nodes, features and
accounts that the packaged profiles name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph import dag, recipe
from pipeline.launch import cluster_profile, slurm
from pipeline.launch.cluster_profile import Profile
from pipeline.operations import fit
from tests.fixtures import slurm_fixtures

pytestmark = slurm_fixtures.ON_SLURM
ANSWER = re.compile(r"Slurm takes it, to start at \S+ using (\d+) processors on nodes (\S+) in partition (\w+)")


def packaged(name: str, folder: Path) -> Profile:
    """A packaged profile as it is, but for its image: there is none here, and no pyxis."""
    profile = cluster_profile.load(name)
    settings = profile.cluster()
    image = folder / "image"
    image.touch()
    container = settings.container and settings.container.model_copy(update={"image": str(image)})
    if container is not None and container.kind == "pyxis":
        container = container.model_copy(update={"kind": "apptainer"})
    return profile.model_copy(update={"slurm": settings.model_copy(update={"container": container})})


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("atom-1b-a300m", "h100-modules"), ("atom-30b-a3b", "h100-apptainer"), ("atom-235b-a22b", "h100-pyxis")],
)
def test_slurm_takes_every_script_of_a_recipe_as_it_is_meant(name: str, cluster: str, tmp_path: Path) -> None:
    profile, store = packaged(cluster, tmp_path), Store(tmp_path / "home")
    graph = dag.compose(recipe.load(name), store, without_data=True)
    selected = graph.select(None, None)
    fit.require(graph, store, selected, profile)
    checks = slurm.dry_run(graph, store, selected, profile)
    assert not [f"{row.script}: {row.answer}" for row in checks if not row.ok]
    assert {row.stage for row in checks} == set(selected)
    for row in checks:
        match = ANSWER.fullmatch(row.answer)
        assert match is not None, row.answer
        processors, nodes, partition = int(match[1]), match[2], match[3]
        node = graph.nodes[row.stage]
        needs = node.stage.needs(node.config)
        settings = profile.cluster()
        # what Slurm understood, by the ranks and GPUs of the recipe
        if Path(row.script).name.endswith(".servers.sh"):
            expected = (settings.servers.cpus_per_task, 1, "gpu") if settings.servers else None
        elif needs.trains:
            expected = (needs.ranks * 12, needs.ranks // 8, "gpu")
        elif needs.gpus:
            expected = (needs.gpus * 12, 1, "gpu")
        else:
            expected = (8, 1, "cpu")
        count = len(slurm_fixtures.slurm("scontrol", "show", "hostnames", nodes).split())
        assert (processors, count, partition) == expected, row
