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

from pipeline.core.store import Store
from pipeline.launch import bad_nodes, cluster_profile, slurm
from tests.fixtures import counting_fixtures, slurm_fixtures
from tests.fixtures.counting_fixtures import COUNTED
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
    with partition("late", "down"):
        assert "1 stage submitted" in atom(home, "retry").stdout
        job = slurm_fixtures.job_of(home, "pretrain")

        def reason(word: str) -> str:
            text = str(pretrain(home).get("reason"))
            return text if word in text else ""

        closed = slurm_fixtures.until(lambda: reason("PartitionDown"), "the closed partition")
        assert closed == ("partition late is closed: its jobs wait until an administrator opens it (PartitionDown)")
        assert f"closed partition: stage pretrain: {closed}" in atom(home, *LOOK, code=1).stdout
        slurm_fixtures.slurm("scontrol", "update", f"jobid={job}", "comment=charged to project 42", "name=llm")
        assert pretrain(home)["state"] == "pending", "Slurm lists it"
        again = json.loads(atom(home, *command, "--json").stdout)
        assert again["attached"] == {"pretrain": job} and not again["submitted"]
        with maintenance():
            slurm_fixtures.slurm("scontrol", "update", "partitionname=late", "state=up")
            reserved = slurm_fixtures.until(lambda: reason("maintenance"), "the reservation")
            assert reserved.startswith("its nodes are reserved for maintenance; see `scontrol show reservation`")
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
        alerts = atom(home, *LOOK, code=None).stdout.splitlines()
        assert [line for line in alerts if not line.startswith("slow rank")] == []
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
    excluded = f"{node},{node}" if node == "n1" else node  # by the script itself, or by one that has the home folder
    assert detail(job, "ExcNodeList") == excluded and stage["restarts"] == 1
    (folder,) = [run.node_folder(row["name"]) for row in run.body["nodes"]]
    launches = sorted(path.name for path in folder.glob(f"ranks/{job}.[0-9]*"))
    assert launches == ([f"{job}.1"] if node == "n1" else [f"{job}.0", f"{job}.1"])


@at_length("slurm-stages", 100)
def test_a_stage_with_servers_holds_no_nodes_while_none_runs(tmp_path: Path) -> None:
    """Its first server waits for a closed partition, and later is held after a requeue."""
    home, store = tmp_path / "home", Store(tmp_path / "home")
    home.mkdir()
    path = slurm_fixtures.write_profile(
        tmp_path,
        environment={"PYTHONPATH": counting_fixtures.python_path(tmp_path)},
        servers={"partition": "late", "minutes": 30, "count": 2},
        free_gb=0.0,
    )
    with partition("late", "down"):
        graph = counting_fixtures.graph(0.5, servers=True)
        submission = slurm.submit(graph, store, ["counting"], cluster_profile.load(path), path)
        job, (first, others) = submission.submitted["counting"], submission.servers["counting"]

        def state(id: str) -> str:
            return slurm_fixtures.slurm("squeue", "-h", "-j", id, "-o", "%T %r").strip()

        slurm_fixtures.until(lambda: state(job) == "PENDING Dependency", "the stage waits for its first server")
        slurm_fixtures.until(lambda: state(f"{first}_0") == "PENDING PartitionDown", "the first server waits")
        names = slurm_fixtures.slurm("squeue", "-h", "-o", "%j", "--partition=late").split()
        assert set(names) == {"atom-counting-servers"}
        slurm_fixtures.slurm("scontrol", "update", "partitionname=late", "state=up")
        slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "counting", 3), "a step with a server")
        slurm_fixtures.until(lambda: state(f"{others}_1").startswith("RUNNING"), "the other server")
        slurm_fixtures.slurm("scancel", others)
        slurm_fixtures.slurm("scontrol", "requeuehold", f"{first}_0")
        slurm_fixtures.slurm("scontrol", "requeue", job)
        slurm_fixtures.until(lambda: state(job) == "PENDING Dependency", "the stage waits in the queue again")
        log = next(home.glob(f"logs/*/counting/submitit/{job}_0_log.out")).read_text()
        assert f"no server runs; the job waits in the queue for the first one, {first}" in log
        assert slurm_fixtures.attempts(home, "counting") == 1
        slurm_fixtures.slurm("scontrol", "release", f"{first}_0")
        sealed = slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "counting"), "the end")
        assert (sealed.parent / "steps").read_text() == COUNTED and slurm_fixtures.attempts(home, "counting") == 2
        slurm_fixtures.until(lambda: not state(f"{first}_0").startswith("RUNNING"), "the end of the server", 150)
