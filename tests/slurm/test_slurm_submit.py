"""Submitting to a real Slurm: once and twice, from frozen code, what is refused, without Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import finish, finished_stages, submit
from tests.fixtures.run_fixtures import SOAK, at_length, atom

pytestmark = slurm_fixtures.ON_SLURM


def test_submitting_twice_attaches_and_two_at_once_share(home: Path, calm: str) -> None:
    folder = home.parent
    recipe, cluster = slurm_fixtures.write_recipe(folder), slurm_fixtures.write_profile(folder)
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "submit",
        recipe,
        "--cluster",
        cluster,
        "--until",
        "pretrain",
        "--json",
    ]
    environment, pipes = {**os.environ, "ATOM_HOME": str(home)}, {"stdout": subprocess.PIPE, "text": True}
    slurm_fixtures.slurm("scontrol", "update", "partitionname=test", "state=down")
    try:
        both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
        reports = [json.loads(each.communicate(timeout=60)[0]) for each in both]
        assert sorted(list(each["submitted"]) for each in reports) == [[], ["pretrain"]]
        third = json.loads(atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain", "--json").stdout)
        job = slurm_fixtures.job_of(home, "pretrain")
        assert third["attached"] == {"pretrain": job} and not third["submitted"]
    finally:
        slurm_fixtures.slurm("scontrol", "update", "partitionname=test", "state=up")
    assert finish(home) == calm
    assert slurm_fixtures.attempts(home, "pretrain") == 1
    assert "all sealed" not in atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain").stdout


@at_length("slurm-stages", 25)
def test_jobs_run_from_the_code_as_it_was(home: Path, tmp_path: Path) -> None:
    submit(home)
    (code,) = (home / "code").iterdir()
    assert (code / "stages/train/pretrain.py").read_bytes() == (
        slurm_fixtures.ROOT / "stages/train/pretrain.py"
    ).read_bytes()
    assert not os.access(code / "stages/train/pretrain.py", os.W_OK) or os.geteuid() == 0
    script = next(home.glob("logs/*/pretrain/submitit/*_submission.sh")).read_text()
    assert f"export PYTHONPATH={code}\n" in script and "HF_TOKEN" not in script
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 1), "a step")
    environment = (
        (
            Path("/proc")
            / str(slurm_fixtures.processes(slurm_fixtures.nodes_of(home, "pretrain")[0], b"submitit")[0])
            / "environ"
        )
        .read_bytes()
        .split(b"\0")
    )
    assert f"PYTHONPATH={code}".encode() in environment
    assert "pretrain" in atom(home, "cancel").stdout
    slurm_fixtures.until(lambda: finished_stages(home), "an end")
    assert slurm_fixtures.attempts(home, "pretrain") == 1, "what is cancelled does not come back"


REFUSED: list[tuple[dict, str]] = [
    ({"train": {"partition": "nowhere"}}, "invalid partition specified: nowhere"),
    ({"train": {"cpus_per_task": 97}}, "Requested node configuration is not available (--cpus-per-task=97 --nodes=2 "),
    ({"train": {"minutes": 0}}, "slurm.train.minutes = 0"),
    ({"train": {"partitions": "test"}}, "did you mean partition?"),
    ({"train": {"memory_gb": 9e5}}, "Requested node configuration is not available"),
    ({"train": {"account": "nobody"}}, "Invalid account or account/partition combination"),
]


@pytest.mark.parametrize("changed, words", REFUSED[:: 1 if SOAK else 3], ids=str)
def test_what_slurm_or_the_schema_refuses_is_one_sentence_and_leaves_nothing(
    home: Path, changed: dict, words: str
) -> None:
    folder = home.parent
    recipe, cluster = slurm_fixtures.write_recipe(folder), slurm_fixtures.write_profile(folder, **changed)
    for options in ((), ("--dry-run",)):
        stderr = atom(home, "submit", recipe, "--cluster", cluster, "--until", "midtrain", *options, code=2).stderr
        assert stderr.count("\n") == 1 and words in stderr, stderr
    assert not slurm_fixtures.slurm("squeue", "-h", "--me", "-t", "pending,running")
    assert not list(home.glob("jobs/*.json"))


def test_a_second_test_cluster_is_refused_in_one_sentence_and_takes_down_nothing(tmp_path: Path) -> None:
    other = {**os.environ, "SLURM_TEST_DIR": str(tmp_path / "other")}
    up = subprocess.run([str(slurm_fixtures.CLUSTER), "up"], env=other, capture_output=True, text=True, timeout=60)
    assert up.returncode == 1 and not up.stdout and up.stderr.count("\n") == 1, up
    assert f"another Slurm test cluster runs on this machine, of {slurm_fixtures.PLACE} " in up.stderr
    assert not (tmp_path / "other").exists()
    down = subprocess.run([str(slurm_fixtures.CLUSTER), "down"], env=other, capture_output=True, text=True, timeout=60)
    assert (down.returncode, down.stdout, down.stderr) == (0, "", "")
    slurm_fixtures.cluster("up")  # says at once that all is up
    assert len(slurm_fixtures.slurm("sinfo", "-h", "-N", "-p", "test", "-t", "idle,mix,alloc").splitlines()) == 4


def test_without_slurm_one_sentence(home: Path, tmp_path: Path) -> None:
    recipe, cluster = slurm_fixtures.write_recipe(tmp_path), slurm_fixtures.write_profile(tmp_path)
    command = ("submit", recipe, "--cluster", cluster, "--until", "pretrain")
    stderr = atom(home, *command, code=2, PATH=str(tmp_path)).stderr
    assert stderr.count("\n") == 1 and "there is no s" in stderr and "atom run" in stderr
    dead = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    dead.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=45999", text))
    shutil.copy(slurm_fixtures.PLACE / "etc/slurm.key", tmp_path)
    stderr = atom(home, *command, code=2, SLURM_CONF=str(dead)).stderr
    assert stderr.count("\n") == 1 and "squeue failed: " in stderr and "ontroller" in stderr
    stderr = atom(home, "submit", recipe, "--cluster", "local", code=2).stderr
    assert stderr.count("\n") == 1 and "has no section slurm" in stderr
