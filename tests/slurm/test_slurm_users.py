"""On a real Slurm cluster: several users share a home folder by their group. A job of a key is shared, whoever submits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import counting_fixtures, slurm_fixtures, user_fixtures
from tests.fixtures.counting_fixtures import COUNTED
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.user_fixtures import FIRST, READER, SECOND, Team

pytestmark = slurm_fixtures.ON_SLURM
LONG = 15.0
"""Seconds of a step of a job that must not end before all is tried, however slow the machine is."""


@pytest.fixture
def team() -> Iterator[Team]:
    with user_fixtures.team() as team:
        yield team
        user_fixtures.cancel_all()
        slurm_fixtures.until(lambda: not slurm_fixtures.slurm("squeue", "-h").strip(), "an empty cluster")


def submit(team: Team, user: str, seconds: float) -> tuple[str, str, str]:
    """Submits the stage that counts; returns what was printed, the run and its job."""
    earlier = set(team.home.glob("logs/*/run.json"))
    path = counting_fixtures.python_path(team.place)
    packages = team.environment.get("PYTHONPATH", "")
    profile = team.profile(environment={"PYTHONPATH": f"{path}:{packages}"}, free_gb=0.0)
    printed = team.run(
        user, "env", f"PYTHONPATH={path}:{packages}", team.python, "-m", "tests.fixtures.counting_fixtures", profile,
        str(seconds),
    )  # fmt: skip
    (run,) = {path.parent.name for path in set(team.home.glob("logs/*/run.json")) - earlier}
    (row,) = map(json.loads, (team.home / "logs" / run / "jobs.jsonl").read_text().splitlines())
    return printed, run, row["job"]


def stage(team: Team, user: str, run: str) -> dict[str, str]:
    (shown,) = json.loads(team.atom(user, "status", run, "--json"))["stages"]
    assert isinstance(shown, dict)
    return shown


def counts(team: Team) -> None:
    slurm_fixtures.until(lambda: slurm_fixtures.reached(team.home, "counting", 2), "step 2")


def product(team: Team) -> str:
    folder: Path = slurm_fixtures.until(lambda: slurm_fixtures.sealed(team.home, "counting"), "the end").parent
    return (folder / "steps").read_text()


def files(home: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in home.rglob("*")}


def waits(job: str) -> bool:
    return slurm_fixtures.slurm("squeue", "-h", "-j", job, "-o", "%T %r").strip() == "PENDING Dependency"


@at_length("slurm-stages", 60)
def test_another_users_job_that_is_seen_is_shared_and_cancelled_after_a_question(team: Team) -> None:
    """Root sees all jobs, as every user does on a cluster without PrivateData."""
    _, run, job = submit(team, FIRST, LONG)
    printed, second_run, second_job = submit(team, "root", LONG)
    assert "1 already queued in Slurm" in printed and second_job == job
    assert stage(team, "root", second_run)["user"] == FIRST
    counts(team)
    before = files(team.home)
    for arguments in (("status",), ("status", run), ("runs",), ("nodes",)):
        assert team.atom(READER, *arguments)
    assert set(files(team.home)) == set(before), "who reads writes nothing"
    assert f"run {second_run} of root waits for its jobs; add --yes" in team.atom(FIRST, "cancel", run, code=2)
    assert f"run {run} is {FIRST}'s; add --yes" in team.atom("root", "cancel", run, code=2)
    assert "RUNNING" in slurm_fixtures.slurm("squeue", "-h", "-j", job, "-o", "%T")
    printed = team.atom("root", "cancel", run, "--yes")
    assert "cancelled counting" in printed and f"run {second_run} of root waited for these jobs" in printed
    slurm_fixtures.until(lambda: stage(team, FIRST, run)["state"] == "cancelled", "its end")
    _, third_run, third_job = submit(team, SECOND, 0.1)
    assert product(team) == COUNTED and third_job != job and third_run != run
    text = team.atom(READER, "gc", "--delete", "--yes", code=2)
    assert "Permission denied" in text and "Traceback" not in text, text
