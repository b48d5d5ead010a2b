"""On a real Slurm cluster: ranks that are lost start again in the same allocation, without queueing, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import source_code
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.launch import bad_nodes, cluster_profile, slurm
from pipeline.launch.batch_script import RunScripts
from pipeline.launch.job import JobLimits
from tests.fixtures import counting_fixtures, slurm_fixtures
from tests.fixtures.counting_fixtures import COUNTED
from tests.fixtures.disturbance_fixtures import crash, finish, first_rank_killed, rank_killed, submit
from tests.fixtures.run_fixtures import at_length

pytestmark = slurm_fixtures.ON_SLURM


def steps_of(job: str) -> list[str]:
    """The restarts of a job and the names of its steps, by Slurm."""
    rows = slurm_fixtures.slurm("sacct", "-n", "-P", "-D", "-j", job, "-o", "JobID,JobName,Restarts").splitlines()
    return [row for row in rows if row.split("|")[1] not in ("batch", "extern", "sh")]


def launches(home: Path, stage: str) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in home.glob(f"logs/*/{stage}/ranks/*/"))


def start(folder: Path, seconds: float = 0.25, **settings: object) -> str:
    """Submits the stage that counts, on two nodes; returns its job. seconds: of a step."""
    environment = {"PYTHONPATH": counting_fixtures.python_path(folder)}
    path = slurm_fixtures.write_profile(folder, environment=environment, free_gb=0.0, **settings)
    profile, store, graph = cluster_profile.load(path), Store(folder / "home"), counting_fixtures.graph(seconds)
    (node,) = graph.nodes.values()
    run = runs.start(graph, store, [node.name], "dev", {"launcher": "slurm"})
    limits = JobLimits(None, profile.cluster().restarts, 0.0, None, profile.cluster().variables)
    script = RunScripts(store, run, profile.cluster(), source_code.freeze(store, {})).of_stage(node, [])
    job = slurm.start(script, slurm.task_of(graph, store, run, node, profile), limits)
    run.note_job(node.name, job, False)
    return job


def disturb(home: Path, step: int, attempt: int, kill: object = rank_killed) -> None:
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "counting", step, attempt), f"step {step}")
    assert callable(kill)
    kill(home, "counting")


def end(home: Path) -> str:
    folder = slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "counting"), "the end")
    return (folder.parent / "steps").read_text()


@at_length("slurm-stages", 30)
@pytest.mark.parametrize("kill", [rank_killed, first_rank_killed], ids=lambda x: x.__name__)
def test_a_killed_rank_starts_again_in_the_same_allocation(kill: object, tmp_path: Path) -> None:
    job, home = start(tmp_path), tmp_path / "home"
    disturb(home, 5, 1, kill)
    assert end(home) == COUNTED
    assert launches(home, "counting") == ["0", "0.1"]

    def two_steps() -> bool:
        restarts = {row.split("|")[2] for row in steps_of(job) if row.startswith(f"{job}|")}
        steps = [row for row in steps_of(job) if row.startswith(f"{job}.")]
        return restarts == {"0"} and len(steps) == 2

    slurm_fixtures.until(two_steps, f"two steps of one start, not {steps_of(job)}", 30)
    logs = [path.read_text() for path in home.glob(f"logs/*/counting/submitit/{job}_*_log.out")]
    assert len(logs) == 2 and not any("restarts without" in log for log in logs), "each rank starts Python once"


@at_length("slurm-stages", 60)
def test_after_the_limit_the_job_is_requeued(tmp_path: Path) -> None:
    home = tmp_path / "home"
    start(tmp_path, restarts_in_allocation=1)
    nodes: list[str] = []
    for attempt, step in enumerate((5, 12, 20), start=1):
        disturb(home, step, attempt, kill=lambda *_: nodes.append(slurm_fixtures.nodes_of(home, "counting")[-1]))
        rank_killed(home, "counting")
    assert end(home) == COUNTED
    assert launches(home, "counting") == ["0", "0.1", "1", "1.1"]
    blamed = [entry.node for entry in bad_nodes.read(Store(home))]
    assert blamed == [nodes[0]] == [nodes[1]] and nodes[2] != nodes[0], "for two lost ranks in a row"


@at_length("slurm-stages", 100)
def test_a_spare_node_takes_the_place_of_a_lost_one(tmp_path: Path) -> None:
    # rank 0 must still count when Slurm notices that the node of the other rank is gone
    job, home = start(tmp_path, seconds=2.0, train={"spare_nodes": 1}), tmp_path / "home"
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "counting", 5), "step 5")
    first, *others = slurm_fixtures.nodes_of(home, "counting")
    second, spare = sorted(others, key=lambda node: not slurm_fixtures.processes(node, b"submitit"))
    assert slurm_fixtures.processes(second, b"submitit") and not slurm_fixtures.processes(spare, b"submitit")
    crash(second, comes_back=False)
    try:
        assert end(home) == COUNTED
    finally:
        slurm_fixtures.cluster("up")
    assert launches(home, "counting")[:2] == [
        "0",
        "0.1",
    ]  # Slurm may report the spare node lost too, and start it again
    log = next(home.glob(f"logs/*/counting/submitit/{job}_0_log.out")).read_text()
    assert f"launch 1 in the same allocation: --overlap --mem=0 --nodelist={first},{spare}\n" in log


@at_length("slurm-stages", 60)
def test_a_job_that_loses_its_first_node_is_requeued(tmp_path: Path) -> None:
    """The node that runs the job's script: no spare one takes its place."""
    home = tmp_path / "home"
    start(tmp_path, train={"spare_nodes": 1})
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "counting", 5), "step 5")
    crash(slurm_fixtures.nodes_of(home, "counting")[0])
    assert end(home) == COUNTED


@at_length("slurm-stages", 60)
def test_training_is_launched_again_with_the_same_bytes(home: Path, calm: str) -> None:
    submit(home)
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 12), "step 12")
    rank_killed(home)
    assert finish(home) == calm
    assert launches(home, "pretrain") == ["0", "0.1"]
