"""Slurm's disturbances at length, by `make soak`: in random order, in a whole recipe, and a time limit again and again."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import (
    AT_LENGTH,
    RESTARTED,
    daemons_killed,
    finish,
    node_crash,
    node_down,
    preempt,
    rank_killed,
    status,
)
from tests.fixtures.run_fixtures import SOAK, atom, digests

pytestmark = slurm_fixtures.ON_SLURM


def until(condition: Callable[[], bool], why: str, home: Path) -> None:
    """Waits, and does what status advises where Slurm holds a job back: a controller that was killed while it started the
    job may start it twice, and takes that for a fault of the node."""
    for _ in range(30):
        try:
            return slurm_fixtures.until(condition, why, 30)
        except AssertionError:
            if any("retry" in stage.get("reason", "") for stage in status(home)["stages"]):
                atom(home, "retry")
    slurm_fixtures.until(condition, why, 1)


@pytest.mark.skipif(not SOAK, reason="ten minutes each; see `make soak`")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.timeout(1800)
def test_the_same_bytes_after_everything_in_random_order(seed: int, upstream: Path, home: Path) -> None:
    """`make soak`: each kind of disturbance in one run, wherever it happens to be."""
    rng, folder = random.Random(seed), home.parent
    phase = {"steps": 600, "watchdog_timeout_seconds": 8.0, "release_checkpoint_interval": 600}
    recipe = slurm_fixtures.write_recipe(folder, **phase)
    (folder / "calm").mkdir()
    shutil.copytree(upstream, folder / "calm/home")
    atom(folder / "calm/home", "run", recipe, "--until", "pretrain")
    cluster = slurm_fixtures.write_profile(folder, train={"partition": "low"}, restarts=20)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    kinds = [*RESTARTED, *AT_LENGTH]
    rng.shuffle(kinds)
    for number, disturb in enumerate(kinds):
        steps = 20 + 40 * number
        until(lambda n=steps: slurm_fixtures.reached(home, "pretrain", n), f"step {steps}", home)
        time.sleep(rng.random() * 4)
        job = slurm_fixtures.job_of(home, "pretrain")
        slurm_fixtures.until(
            lambda j=job: "RUNNING" in slurm_fixtures.slurm("squeue", "-h", "-j", j, "-o", "%T"), "it runs", 300
        )
        print(disturb.__name__, flush=True)
        disturb(home)
    until(lambda: slurm_fixtures.sealed(home, "pretrain"), "pretrain sealed", home)
    assert slurm_fixtures.digest(home, "pretrain") == slurm_fixtures.digest(folder / "calm/home", "pretrain")


@pytest.mark.skipif(not SOAK, reason="a quarter of an hour each; see `make soak`")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.timeout(3600)
def test_a_whole_recipe_in_disorder_has_the_digests_of_a_quiet_one(seed: int, tmp_path: Path) -> None:
    """`make soak`: all stages, training on two nodes, arrays of shards; whatever runs is disturbed every few seconds, and
    status is held to squeue and sacct all the while."""
    rng, home, quiet = random.Random(seed), tmp_path / "home", tmp_path / "quiet"
    recipe = slurm_fixtures.with_parts(tmp_path, 3)
    body = yaml.safe_load(Path(recipe).read_text())
    Path(recipe).write_text(yaml.safe_dump(body))
    atom(quiet, "run", recipe)
    cluster = slurm_fixtures.write_profile(tmp_path, cpu={"partition": "low"}, train={"partition": "low"}, restarts=30)
    atom(home, "submit", recipe, "--cluster", cluster)
    kinds: list[Callable[[Path, str], None]] = []
    while True:
        report = told_truly(home)
        if all(stage["state"] == "sealed" for stage in report["stages"]):
            break
        bad = [stage for stage in report["stages"] if stage["state"] in ("failed", "cancelled")]
        assert not bad, bad
        if any(stage["state"] == "lost" or "retry" in stage.get("reason", "") for stage in report["stages"]):
            atom(home, "retry")
        running = [stage["name"] for stage in report["stages"] if stage["state"] == "running"]
        if not running or rng.random() < 0.5:
            time.sleep(rng.random() * 8)
            continue
        if not kinds:
            kinds = rng.sample(
                [*RESTARTED, daemons_killed, preempt, node_down, node_crash, rank_killed], len(RESTARTED) + 5
            )
        disturb, stage = kinds.pop(), rng.choice(running)
        print(f"{disturb.__name__}: {stage}", flush=True)
        try:
            disturb(home, stage)
        except (AssertionError, IndexError):  # the job has ended meanwhile
            slurm_fixtures.until(lambda s=stage: s not in running_now(home), "the end of what was disturbed")
        slurm_fixtures.cluster("up")
    assert digests(home) == digests(quiet)


def running_now(home: Path) -> list[str]:
    return [stage["name"] for stage in status(home)["stages"] if stage["state"] == "running"]


def told_truly(home: Path) -> dict:
    """What status says, after a comparison with what Slurm said just before and after."""

    def job_states() -> dict[str, str]:
        return dict(
            line.split("|") for line in slurm_fixtures.slurm("squeue", "-h", "-t", "all", "-o", "%i|%T").splitlines()
        )

    before, report, after = job_states(), status(home), job_states()
    for stage in report["stages"]:
        state = before.get(stage.get("job", ""))
        if state != after.get(stage.get("job", "")) or state is None or stage["state"] in ("lost", "sealed"):
            continue  # it was changing; or Slurm has another job of that number; or the artifact says more
        expected = {"COMPLETED": "sealed", "NODE_FAIL": "failed", "TIMEOUT": "failed"}.get(state, state.lower())
        assert stage["state"] == expected, (stage, state)
    return report


@pytest.mark.skipif(not SOAK, reason="four minutes; see `make soak`; `signalled_to_save` sends the same signal by hand")
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
