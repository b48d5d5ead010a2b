"""On a real Slurm cluster: a submission that Slurm refuses, what a site changes in waiting jobs, alerts through a requeue, and
nodes without the home folder."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.launch import bad_nodes
from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import finish, status, submit
from tests.fixtures.run_fixtures import at_length, atom
from tests.fixtures.slurm_stage_fixtures import detail, ended, start

pytestmark = slurm_fixtures.ON_SLURM
LOOK = ("watch", "--once", "--free-gb", "0")


@contextmanager
def partition(name: str, state: str) -> Iterator[None]:
    slurm_fixtures.slurm("scontrol", "create", f"partitionname={name}", "nodes=n[1-4]", f"state={state}")
    try:
        yield
    finally:
        subprocess.run(["scancel", f"--partition={name}"], check=False)
        deleted = lambda: subprocess.run(["scontrol", "delete", f"partitionname={name}"]).returncode == 0  # noqa: E731
        slurm_fixtures.until(deleted, f"the end of partition {name}", 60)


@contextmanager
def maintenance() -> Iterator[None]:
    """All nodes are reserved, from soon on."""
    options = ("starttime=now+10minutes", "duration=60", "flags=maint,ignore_jobs", "nodes=ALL", "users=root")
    slurm_fixtures.slurm("scontrol", "create", "reservation", "reservationname=maint1", *options)
    try:
        yield
    finally:
        slurm_fixtures.slurm("scontrol", "delete", "reservation=maint1")


def pretrain(home: Path) -> dict[str, str]:
    stage: dict[str, str] = next(stage for stage in status(home)["stages"] if stage["name"] == "pretrain")
    return stage


def test_a_refused_submission_is_retried_on_slurm_and_its_job_is_known_whatever_a_site_changes(home: Path) -> None:
    folder = home.parent
    recipe = slurm_fixtures.write_recipe(folder)
    cluster = slurm_fixtures.write_profile(folder, train={"partition": "late"})
    command = ("submit", recipe, "--cluster", cluster, "--until", "pretrain")
    assert "invalid partition specified: late" in atom(home, *command, code=2).stderr
    stage = pretrain(home)
    assert stage["state"] == "refused" and "invalid partition specified: late" in stage["message"], stage
    with maintenance(), partition("late", "down"):
        assert "1 stage submitted" in atom(home, "retry").stdout
        job = slurm_fixtures.job_of(home, "pretrain")

        def reason(word: str) -> str:
            text = str(pretrain(home).get("reason"))
            return text if word in text else ""

        closed = slurm_fixtures.until(lambda: reason("PartitionDown"), "the closed partition")
        assert closed == ("partition late is closed (PartitionDown): its jobs wait until an administrator opens it")
        assert f"closed partition: stage pretrain: {closed}" in atom(home, *LOOK, code=1).stdout
        slurm_fixtures.slurm("scontrol", "update", f"jobid={job}", "comment=charged to project 42", "name=llm")
        assert pretrain(home)["state"] == "pending", "Slurm lists it"
        again = json.loads(atom(home, *command, "--json").stdout)
        assert again["attached"] == {"pretrain": job} and not again["submitted"]
        slurm_fixtures.slurm("scontrol", "update", "partitionname=late", "state=up")
        reserved = slurm_fixtures.until(lambda: reason("maintenance"), "the reservation")
        assert reserved.startswith("its nodes are reserved for maintenance (ReqNodeNotAvail, Reserved for maint")
        assert ": maint1 from " in reserved and "; with minutes of at most " in reserved
        first = sorted(path.parent.name for path in home.glob("logs/*/jobs.jsonl"))[0]
        assert "cancelled pretrain" in atom(home, "cancel", first).stdout
    assert slurm_fixtures.attempts(home, "pretrain") == 0, "nothing of it ran on this host"


@at_length("slurm-stages", 60)
def test_a_requeue_raises_no_alert(home: Path, calm: str) -> None:
    submit(home)
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 12), "step 12")
    slurm_fixtures.slurm("scontrol", "requeue", slurm_fixtures.job_of(home, "pretrain"))
    seen = set()
    while not slurm_fixtures.sealed(home, "pretrain"):
        seen.add(pretrain(home)["state"])
        assert atom(home, *LOOK).stdout == ""
    assert finish(home) == calm and "pending" in seen


@contextmanager
def without_home(node: str, home: Path) -> Iterator[None]:
    """The daemon of a node sees an empty folder in the place of the home folder, as if it was not mounted."""
    slurm_fixtures.kill([slurm_fixtures.daemon(f"slurmd.{node}")])
    time.sleep(1)
    hide = f"mount --make-rprivate / && mount -t tmpfs none {home} && exec slurmd -N {node}"
    subprocess.run(["unshare", "--mount", "sh", "-c", hide], check=True)
    try:
        yield
    finally:
        slurm_fixtures.kill([slurm_fixtures.daemon(f"slurmd.{node}")])
        slurm_fixtures.cluster("up")


@at_length("slurm-stages", 100)
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_without_the_home_folder_is_avoided_and_no_other_one_is_blamed(node: str, tmp_path: Path) -> None:
    """The first node runs the job's script, and leaves no file: the next start notes it."""
    home = tmp_path / "home"
    home.mkdir()
    with without_home(node, home):
        begun = time.monotonic()
        store, run, job = start(tmp_path, "seal", 2)
        slurm_fixtures.until(lambda: "RUNNING" not in slurm_fixtures.slurm("squeue", "-h", "-j", job, "-o", "%T %i")
                             and time.monotonic() - begun > 3, "the end of the first start", 60)  # fmt: skip
        assert time.monotonic() - begun < 40, "no Python has to give up first"
        stage = ended(store, "sealed")
    (entry,) = bad_nodes.read(store)
    assert entry.node == node and entry.evidence.startswith(f"node {node} does not see the run in $ATOM_HOME")
    assert detail(job, "ExcNodeList") == node and stage["restarts"] == 1
    (folder,) = [run.node_folder(row["name"]) for row in run.body["nodes"]]
    launches = sorted(path.name for path in folder.glob(f"ranks/{job}.[0-9]*"))
    assert launches == ([f"{job}.1"] if node == "n1" else [f"{job}.0", f"{job}.1"])
