"""What sites need of a job's script: memory, whole nodes, pyxis, comments and names of their own; and settings that
contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.stage import Estimate
from pipeline.graph import plan
from pipeline.graph.dag import State
from pipeline.launch import cluster_profile, slurm
from pipeline.launch.cluster_profile import Profile, Slurm
from pipeline.operations.fit import estimate_costs
from tests.fixtures.batch_fixtures import SLURM, script
from tests.fixtures.fit_fixtures import BODY

GPUS = {"partition": "gpu", "minutes": 90, "gpus_per_node": 8, "tasks_per_node": 8, "cpus_per_task": 12}


@pytest.mark.parametrize(
    ("settings", "ranks", "memory"),
    [
        ({**GPUS}, 16, "0"),
        ({**GPUS}, 2, None),  # it leaves six GPUs to others
        ({**GPUS, "exclusive": True}, 2, "0"),
        ({**GPUS, "memory_gb": 100}, 16, "102400M"),
        ({"partition": "gpu", "minutes": 90}, 2, None),
        ({"partition": "gpu", "minutes": 90, "exclusive": True}, 2, "0"),
    ],
)
def test_a_job_that_has_a_node_alone_has_all_of_its_memory(
    settings: dict[str, Any], ranks: int, memory: str | None
) -> None:
    """Slurm gives it no more than DefMemPerCPU otherwise, with --exclusive as well."""
    options = script(Slurm.model_validate({**SLURM, "train": settings}), ranks=ranks).sbatch_options
    assert options.get("mem") == memory


@pytest.mark.parametrize("name", ["h100-pyxis", "h100-apptainer", "h100-modules", "gb200-pyxis"])
def test_packaged_profiles_give_training_and_servers_all_memory_of_a_node(name: str) -> None:
    profile = cluster_profile.load(name).cluster()
    train = profile.train
    assert script(profile, ranks=2 * train.tasks_per_node).sbatch_options["mem"] == "0"
    assert profile.servers is not None and profile.servers.memory_gb is None
    text = Path(cluster_profile.__file__).parents[1].joinpath("clusters", f"{name}.yaml").read_text()
    values = [row.partition(":")[2] for row in text.splitlines() if row.strip().startswith("NCCL_IB_HCA")]
    assert values == [], "without = a name is a prefix, which takes the adapters of storage, too"


def test_pyxis_mounts_no_home_and_runs_no_entry_point_unless_the_profile_says_so() -> None:
    container = {"kind": "pyxis", "image": "/images/atom.sqsh"}
    text = script(Slurm.model_validate({**SLURM, "container": container})).srun_options
    assert " --mpi=none " in text and text.endswith(" --no-container-mount-home --no-container-entrypoint")
    train = {**SLURM["train"], "srun": ["--container-mount-home", "--mpi=pmix"]}
    text = script(Slurm.model_validate({**SLURM, "container": container, "train": train})).srun_options
    assert "--no-container-mount-home" not in text and "--no-container-entrypoint --container-mount-home" in text
    assert text.index("--mpi=none") < text.index("--mpi=pmix"), "the last one counts"
    assert "--no-container" not in script(Slurm.model_validate(SLURM)).srun_options


def test_a_site_may_set_the_comment_and_the_name_of_jobs() -> None:
    options = script(Slurm.model_validate(SLURM)).sbatch_options
    assert (options["job-name"], options["comment"]) == ("atom-pretrain", "atom tiny-1 pretrain pretrain-0123456789ab")
    assert script(Slurm.model_validate(SLURM), tasks=3).sbatch_options["job-name"] == "atom-pretrain-shards"
    train = {**SLURM["train"], "sbatch": ["--comment=project42", "--job-name=llm"]}
    options = script(Slurm.model_validate({**SLURM, "train": train})).sbatch_options
    assert (options["job-name"], options["comment"]) == ("llm", "project42")


def test_where_nodes_are_given_whole_a_stage_asks_for_all_gpus_and_the_plan_says_what_that_costs() -> None:
    jobs = {"partition": "gpu", "minutes": 60, "gpus_per_node": 8, "cpus_per_task": 12}
    settings = {**SLURM, "gpu": {**jobs, "whole_nodes": True}}
    batch = script(Slurm.model_validate(settings), ranks=1, trains=False, gpus=2)
    wanted = {"gpus-per-node": 8, "exclusive": True, "mem": "0", "ntasks-per-node": 1, "cpus-per-task": 24}
    assert wanted.items() <= batch.sbatch_options.items()
    changed = {**SLURM, "gpu": jobs, "stages": {"pre*": {"whole_nodes": True}}}
    batch = script(Slurm.model_validate(changed), ranks=1, trains=False, gpus=2)
    assert batch.sbatch_options["gpus-per-node"] == 8
    hours: dict[bool, float] = {}
    for whole in (False, True):
        profile = Profile.model_validate({**BODY, "slurm": {**BODY["slurm"], "gpu": {**jobs, "whole_nodes": whole}}})
        estimate = Estimate(cpu_seconds=1.0, gpu_seconds=7200.0)
        row = plan.StagePlan(State("evaluate-sft", "e-0", "to run"), estimate, {}, 1, {}, None, False, 1, gpus=2)
        costs = estimate_costs([row], profile, small=False)
        hours[whole] = costs.total.gpu_hours
    assert hours == {False: 2.0, True: 8.0}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "gres": ({"train": {"sbatch": ["--gres=gpu:8"]}}, "--gres=gpu:8 of sbatch asks for GPUs beside gpus_per_node"),
    "gres of a type": (
        {"train": {"gpus_per_node": 8, "sbatch": ["--gres=nvme:1,gpu:h100:8"]}}, "asks for GPUs beside gpus_per_node",
    ),
    "gres of a stage": ({"stages": {"evaluate-*": {"sbatch": ["--gpus=2"]}}}, "--gpus=2 of sbatch asks for GPUs"),
    "GPUs by task": ({"train": {"gpus_per_node": 8, "sbatch": ["--gpus-per-task=1"]}}, "asks for GPUs beside"),
    "memory": ({"train": {"sbatch": ["--mem-per-cpu=4G"]}}, "--mem-per-cpu has a field here; write memory_gb instead"),
    "type without GPUs": ({"train": {"gpu_type": "h100"}}, "gpu_type = h100 needs gpus_per_node, which is 0"),
    "signal": (
        {"train": {"minutes": 2}}, "train.minutes = 2 is no longer than signal_before_limit_seconds = 120",
    ),
    "signal of a stage": (
        {"stages": {"sft": {"minutes": 1}}}, "stages.sft.minutes = 1 is no longer than signal_before_limit_seconds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(name: str, tmp_path: Path) -> None:
    changes, words = CONTRADICTIONS[name]
    body: dict[str, Any] = {key: {**SLURM.get(key, {}), **value} for key, value in changes.items()}
    profile = {"name": "p", "power": {"watts_per_core": 1}, "slurm": {**SLURM, **body}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(RecipeError) as error:
        cluster_profile.load(str(tmp_path / "p.yaml"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_generic_resources_are_the_sites() -> None:
    train = {**SLURM["train"], "sbatch": ["--gres=nvme:1", "--licenses=lustre:2"]}
    assert script(Slurm.model_validate({**SLURM, "train": train})).sbatch_options["gres"] == "nvme:1"


def test_an_image_that_is_not_here_is_noted(tmp_path: Path) -> None:
    profile = cluster_profile.load("h100-pyxis")

    def with_image(image: str) -> Profile:
        assert profile.slurm is not None and profile.slurm.container is not None
        container = profile.slurm.container.model_copy(update={"image": image})
        return profile.model_copy(update={"slurm": profile.slurm.model_copy(update={"container": container})})

    elsewhere = with_image("/nodes/only/atom.sqsh")
    sentence = "slurm.container.image = /nodes/only/atom.sqsh is not on this host; each node of a job needs it"
    assert slurm.missing_image(elsewhere) == sentence
    absent = with_image(str(tmp_path / "atom.sqsh"))
    assert slurm.missing_image(absent) is not None
    (tmp_path / "atom.sqsh").touch()
    assert slurm.missing_image(absent) is None
    assert slurm.missing_image(with_image("docker://example.org/atom")) is None
