"""What is reported of a run on a real Slurm, and what ends it: a diagnosis, a budget; what it costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import crash, finish, finished_stages, node_processes, submit
from tests.fixtures.run_fixtures import at_length, atom

pytestmark = slurm_fixtures.ON_SLURM


def test_a_stage_that_would_fail_again_is_not_retried_and_stops_what_waits_for_it(home: Path) -> None:
    folder = home.parent
    recipe = slurm_fixtures.write_recipe(folder)
    order = next((home / "artifacts").glob("order-pretrain-*"))
    part = order / "part-00000.parquet"
    part.write_bytes(b"x" * part.stat().st_size)  # no retry mends it
    cluster = slurm_fixtures.write_profile(folder, restarts=3)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "midtrain")
    stages = slurm_fixtures.until(lambda: finished_stages(home), "an end")
    assert stages["pretrain"]["state"] == "failed" and "restarts" not in stages["pretrain"]
    assert stages["pretrain"]["kind"] == "user"
    assert stages["midtrain"]["state"] == "cancelled"
    assert "pretrain" in stages["pretrain"]["message"] or "order" in stages["pretrain"]["message"]
    assert atom(home, "logs", "pretrain").stdout.startswith("pretrain failed: ")
    alerts = atom(home, "watch", "--once", "--free-gb", "0", code=1).stdout.splitlines()
    assert f"failed: stage pretrain failed: {stages['pretrain']['message']}" in alerts
    failed = [path for path in (home / "ledger").glob("pretrain-*/*.json")]
    assert len(failed) == 1, "the attempt has its statement"


def test_a_budget_that_is_used_up_stops_what_comes_next(home: Path) -> None:
    folder = home.parent
    recipe = Path(slurm_fixtures.write_recipe(folder))
    body = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**body, "budget": {"core_hours": 1e-6}}))
    stderr = atom(
        home, "submit", str(recipe), "--cluster", slurm_fixtures.write_profile(folder), "--until", "pretrain", code=2
    ).stderr
    assert "the budget of 1e-06 core hours is used up" in stderr and stderr.count("\n") == 1


@at_length("slurm-stages", 90)
def test_an_alert_is_sent_after_the_first_node_of_a_job_vanished(home: Path, calm: str) -> None:
    """While Slurm still counts the node as alive, the stage is silent. Then it ends on other nodes, and nothing is
    wrong any more."""
    alerts = home.parent / "alerts"
    watch = ("watch", "--once", "--free-gb", "0", "--command", f'echo "$ATOM_TEXT" >> {alerts}')
    submit(home)
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 12), "step 12")
    atom(home, *watch)
    node = slurm_fixtures.nodes_of(home, "pretrain")[0]
    try:
        slurm_fixtures.kill(node_processes(node), signal.SIGSTOP)
        time.sleep(4)
        atom(home, *watch, "--stalled-seconds", "2", code=1)
        crash(node)
    finally:
        slurm_fixtures.cluster("up")
    assert finish(home) == calm
    atom(home, *watch)
    assert "stage pretrain has reported nothing" in alerts.read_text() and alerts.read_text().count("\n") == 1


@at_length("slurm-stages", 26)
def test_orchestration_benchmark() -> None:
    run = subprocess.run(
        [sys.executable, "bench/orchestration.py", "--quick"],
        cwd=slurm_fixtures.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    assert json.loads(last)["name"] == "orchestration" and len(table) == 7
