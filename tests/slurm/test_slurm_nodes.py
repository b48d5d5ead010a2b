"""On a real Slurm cluster: a bad node is left out of the next start of a stage, and what ended or holds a job is one sentence
in `atom status`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.launch import bad_nodes
from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import finish, status, submit
from tests.fixtures.run_fixtures import SOAK, at_length, atom
from tests.fixtures.slurm_stage_fixtures import detail, ended, start

pytestmark = slurm_fixtures.ON_SLURM


def python_that(folder: Path, condition: str) -> str:
    """The interpreter of a profile, with lines of shell before it: `exit 127` is an interpreter that does not start."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\n{condition}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


FAULTS = {
    "other node": (
        '[ "$SLURMD_NODENAME" != n2 ] || { echo "no disk" >&2; exit 127; }',
        "n2",
        "Python did not start on n2 (no disk); see its local disk",
    ),
    "interpreter": (
        '[ "$SLURMD_NODENAME" != n1 ] || { echo "no disk" >&2; exit 127; }',
        "n1",
        "Python did not start on n1 (no disk); see its local disk",
    ),
    "preflight": (
        '[ "$SLURMD_NODENAME" != n2 ] || export SLURM_GPUS_ON_NODE=99 CUDA_VISIBLE_DEVICES=$(seq -s , 0 98)',
        "n2",
        "node n2 has 0 GPUs under /dev, and Slurm gave 99",
    ),
}
"""What the interpreter does on one of the four nodes, which one that is, and the evidence."""


@pytest.mark.parametrize("name", list(FAULTS)[: None if SOAK else 1])
def test_a_bad_node_is_left_out_of_the_next_start(name: str, tmp_path: Path) -> None:
    condition, bad, evidence = FAULTS[name]
    store, run, job = start(tmp_path, "seal", 2, python=python_that(tmp_path, condition))
    ended(store, "sealed")
    (folder,) = [run.node_folder(node["name"]) for node in run.body["nodes"]]
    launches = sorted(path.name for path in folder.glob(f"ranks/{job}.[0-9]*"))
    assert launches == [f"{job}.0", f"{job}.1"], "within one restart"
    assert (store.artifacts / "seal-0-0123456789ab/product").read_text() == "of 2 ranks\n"
    assert detail(job, "ExcNodeList") == bad
    used = slurm_fixtures.slurm("scontrol", "show", "hostnames", detail(job, "NodeList")).split()
    assert len(used) == 2 and bad not in used
    (entry,) = bad_nodes.read(store)
    assert (entry.node, entry.job) == (bad, job) and entry.evidence.startswith(evidence), entry
    shown = " ".join(atom(store.home, "status").stdout.split())
    assert f"node {bad} is avoided" in shown and evidence in shown and f"atom nodes clear {bad}" in shown
    assert atom(store.home, "nodes", "clear", bad).stdout == f"cleared: {bad}\n"
    assert atom(store.home, "nodes").stdout == "no node is avoided\n"


def test_a_profile_that_is_wrong_on_every_node_blames_none(tmp_path: Path) -> None:
    store, _, job = start(tmp_path, "seal", 2, python="/no/such/python")
    stage = ended(store, "failed")
    assert stage["message"].startswith("Python starts on none of n1,n2 ("), stage
    assert "No such file" in stage["message"] and detail(job, "Restarts") == "0"
    assert bad_nodes.read(store) == []


@at_length("slurm-stages", 60)
def test_a_bad_node_changes_no_byte_of_a_model(home: Path, calm: str) -> None:
    submit(home, python=python_that(home.parent, FAULTS["interpreter"][0]))
    assert finish(home) == calm
    assert [entry["node"] for entry in status(home)["bad_nodes"]] == ["n1"]


@at_length("slurm-stages", 60)
def test_drained_nodes_held_jobs_and_failed_launches_have_a_sentence_each(tmp_path: Path) -> None:
    slurm_fixtures.slurm("scontrol", "update", "nodename=n[1-4]", "state=drain", "reason=bad fan")
    try:
        store, run, job = start(tmp_path, "seal", 2)
        (folder,) = [run.node_folder(node["name"]) for node in run.body["nodes"]]

        def reason(word: str) -> str | None:
            text = str(ended(store, "pending").get("reason", ""))
            return text if word in text else None

        drained = slurm_fixtures.until(lambda: reason("drained"), "the reason of the drained nodes")
        assert "down or drained" in drained
        slurm_fixtures.slurm("scontrol", "hold", job)
        held = slurm_fixtures.until(lambda: reason("JobHeldAdmin"), "the held job")
        assert held.startswith("an administrator holds it") and f"`scontrol release {job}`" in held
        (folder / "submitit").rename(folder / "away")  # its log cannot be written
        (folder / "submitit").touch()
        slurm_fixtures.slurm("scontrol", "release", job)
    finally:
        slurm_fixtures.slurm("scontrol", "update", "nodename=n[1-4]", "state=resume")
    stage = ended(store, "failed")
    assert stage["message"].startswith("node n1 could not start the job's script (exit code 0:53)"), stage


@at_length("slurm-stages", 100)
def test_a_stage_that_does_not_save_before_its_time_limit(tmp_path: Path) -> None:
    store, _, job = start(tmp_path, "deaf", 2, train={"minutes": 1}, signal_before_limit_seconds=10, restarts=0)
    message = ended(store, "failed")["message"]
    assert message.startswith("its time limit came on n[1-2] before it saved; ")
    assert slurm_fixtures.slurm("sacct", "-n", "-X", "-P", "-j", job, "-o", "State").strip() == "TIMEOUT"


@at_length("slurm-stages", 60)
def test_a_stage_that_meets_its_memory_limit(tmp_path: Path) -> None:
    if "CgroupPlugin=disabled" in (slurm_fixtures.PLACE / "etc/cgroup.conf").read_text():
        pytest.skip("the test cluster holds steps to their memory only where the first kind of cgroups may be written")
    store, run, job = start(tmp_path, "memory", 2, train={"memory_gb": 0.5}, restarts=0)
    message = ended(store, "failed")["message"]
    assert "memory of n1 ran out; raise memory_gb" in message
    (folder,) = [run.node_folder(node["name"]) for node in run.body["nodes"]]
    launches = sorted(path.name for path in folder.glob(f"ranks/{job}.[0-9]*"))
    assert launches == [f"{job}.0", f"{job}.1"], "it is not launched again in the same allocation"
