"""On a real Slurm cluster of virtual nodes: the same bytes as on one machine, whatever happens to jobs, nodes and daemons."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.launch.rendezvous import free_port
from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import (
    AT_LENGTH,
    RESTARTED,
    finish,
    first_rank_killed,
    preempt,
    rank_hangs,
    status,
    submit,
)
from tests.fixtures.run_fixtures import SOAK, at_length, atom
from tests.fixtures.tracking_fixtures import tracked_runs, tracking_server

pytestmark = slurm_fixtures.ON_SLURM


@pytest.mark.parametrize("disturb", RESTARTED | (AT_LENGTH if SOAK else {}), ids=lambda x: x.__name__)
def test_the_same_bytes_after(disturb: Callable[[Path], None], home: Path, calm: str) -> None:
    partition = "low" if disturb is preempt else "test"
    hang = {"watchdog_timeout_seconds": 8.0} if disturb in (rank_hangs, first_rank_killed) else {}
    recipe = slurm_fixtures.write_recipe(home.parent, **hang)
    cluster = slurm_fixtures.write_profile(home.parent, train={"partition": partition})
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 12), "step 12")
    disturb(home)
    assert finish(home) == calm
    if (restarted := (RESTARTED | AT_LENGTH)[disturb]) is not None:
        assert (slurm_fixtures.attempts(home, "pretrain") > 1) == restarted
    report = slurm_fixtures.until(lambda: (s := status(home)) and not s["unknown"] and s, "what Slurm says")
    stage = next(stage for stage in report["stages"] if stage["name"] == "pretrain")
    assert stage["state"] == "sealed" and stage.get("restarts", 0) >= slurm_fixtures.attempts(home, "pretrain") - 1


@at_length("slurm-stages", 50)
def test_jobs_that_the_controller_lost_are_reported_and_submitted_again(home: Path, calm: str) -> None:
    slurm_fixtures.slurm("scontrol", "update", "nodename=n[1-4]", "state=drain", "reason=test")
    time.sleep(6)  # the state before is saved
    submit(home)
    slurm_fixtures.kill([slurm_fixtures.daemon("slurmctld")])
    slurm_fixtures.cluster("up")
    state = next(stage["state"] for stage in status(home)["stages"] if stage["name"] == "pretrain")
    if state == "lost":  # else the controller had saved it in time
        slurm_fixtures.slurm(
            "sbatch", "--hold", "--output=/dev/null", "--wrap=true"
        )  # takes the id that was given before
        assert "1 stage submitted" in atom(home, "retry").stdout
    slurm_fixtures.cluster("up")  # which ends the draining, if the controller remembers it
    assert finish(home) == calm


@at_length("slurm-stages", 100)
def test_jobs_send_to_a_tracking_server_and_go_on_without_it(home: Path, tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "mlflow"
    folder.mkdir()
    recipe = slurm_fixtures.write_recipe(tmp_path, steps=400)
    cluster = slurm_fixtures.write_profile(tmp_path, forward=["MLFLOW_TRACKING_URI"])

    def steps(uri: str) -> list[int]:
        client = MlflowClient(tracking_uri=uri)
        runs_by_name = tracked_runs(uri) if client.get_experiment_by_name("atom-smoke") else {}
        run = runs_by_name.get("pretrain")
        return [m.step for m in client.get_metric_history(run.info.run_id, "loss")] if run else []

    with tracking_server(folder, port) as uri:
        atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain", MLFLOW_TRACKING_URI=uri)
        slurm_fixtures.until(lambda: steps(uri), "steps, while it trains")
        assert not slurm_fixtures.sealed(home, "pretrain")
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "pretrain"), "the end without a server")
    slurm_fixtures.until(
        lambda: "did not accept everything" in atom(home, "logs", "pretrain").stdout, "a word of it", 60
    )
    assert slurm_fixtures.attempts(home, "pretrain") == 1
    with tracking_server(folder, port) as uri:
        atom(home, "sync", MLFLOW_TRACKING_URI=uri)
        assert sorted(steps(uri)) == list(range(1, 401))


@at_length("slurm-stages", 40)
def test_a_full_disk_for_a_while(upstream: Path, calm: str, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("a small disk to fill needs the right to mount one, which a container may not have")
    try:
        shutil.copytree(upstream, place / "home")
        atom(
            place / "home",
            "submit",
            slurm_fixtures.write_recipe(tmp_path),
            "--cluster",
            slurm_fixtures.write_profile(tmp_path, free_gb=0.0),
            "--until",
            "pretrain",
        )
        slurm_fixtures.until(lambda: slurm_fixtures.reached(place / "home", "pretrain", 8), "step 8")
        fill = place / "fill"
        with open(fill, "wb", buffering=0) as file, pytest.raises(OSError):  # else closing it may fail, too
            while True:
                file.write(b"\0" * 65536)
        time.sleep(8)
        fill.unlink()
        assert finish(place / "home") == calm
    finally:
        subprocess.run(["scancel", "--me"], check=False)
        slurm_fixtures.until(
            lambda: not slurm_fixtures.slurm("squeue", "-h", "-t", "running,completing"), "an empty cluster", 60
        )
        subprocess.run(["umount", "-l", str(place)], check=True)


@at_length("slurm-stages", 240)
def test_a_time_limit_reached_again_and_again(upstream: Path, home: Path) -> None:
    """One minute, with a signal some twenty seconds after the start (Slurm may send it much earlier)."""
    folder = home.parent
    recipe = slurm_fixtures.write_recipe(folder, steps=240)
    shutil.copytree(upstream, folder / "calm/home")
    atom(folder / "calm/home", "run", recipe, "--until", "pretrain")
    cluster = slurm_fixtures.write_profile(folder, train={"minutes": 1}, signal_before_limit_seconds=40, restarts=9)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    assert finish(home) == slurm_fixtures.digest(folder / "calm/home", "pretrain")
    assert slurm_fixtures.attempts(home, "pretrain") > 1
