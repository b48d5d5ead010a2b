"""Real vLLM servers in jobs of their own, on a real Slurm: they are found, killed, started again, and end with their stage.

They need vLLM, which wants an environment of its own: ATOM_VLLM_PYTHON names its interpreter, as for `make test-vllm`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.graph import recipe
from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import status
from tests.fixtures.run_fixtures import at_length, atom

pytestmark = [
    *slurm_fixtures.ON_SLURM,
    pytest.mark.skipif("ATOM_VLLM_PYTHON" not in os.environ, reason="vLLM needs an environment of its own"),
]
PATIENCE = 900.0
"""A server imports for a minute, on busy cores for some."""


def rows(home: Path) -> list[dict[str, Any]]:
    """What was submitted for rlvr, in order."""
    runs = sorted(home.glob("logs/*/jobs.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for path in runs for line in path.read_text().splitlines()]
    return [line for line in lines if line["node"] == "rlvr"]


def announced(home: Path) -> dict[str, dict[str, Any]]:
    """{number of a server: its file} of the latest run."""
    run = max(home.glob("logs/*/rlvr/servers"), key=lambda path: path.stat().st_mtime)
    return {path.stem.split("-")[1]: json.loads(path.read_text()) for path in run.glob("announced/server-*.json")}


def queued(*jobs: str) -> str:
    return slurm_fixtures.slurm("squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i %T").strip()


def steps(home: Path) -> int:
    return max((row["done"] for row in slurm_fixtures.events(home, "rlvr") if row["event"] == "progress"), default=0)


@at_length("slurm-servers", 900)
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("transfer", ["folder", "broadcast"])
def test_servers_come_and_go_and_end_with_their_stage(transfer: str, smoke_data: Path, tmp_path: Path) -> None:
    home, path = tmp_path / "home", tmp_path / "served.yaml"
    shutil.copytree(smoke_data, home)
    body = yaml.safe_load((Path(recipe.__file__).parents[1] / "recipes/atom-smoke.yaml").read_text())
    body["rlvr"] |= {
        "steps": 100, "release_checkpoint_interval": 100, "validate_every": 50, "checkpoint_interval": 1,
        "sampling": {"kind": "vllm", "max_new_tokens": 48, "transfer": transfer},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(body))
    for stage in ("sft", "order-rlvr", "tasks-rlvr"):
        atom(home, "run", str(path), "--until", stage)
    cluster = slurm_fixtures.write_profile(
        tmp_path,
        servers={"partition": "test", "minutes": 120, "count": 2},
        environment={"ATOM_VLLM_PYTHON": os.environ["ATOM_VLLM_PYTHON"]},
    )
    only = (str(path), "--cluster", cluster, "--only", "rlvr")
    atom(home, "submit", *only, "--dry-run")
    assert "#SBATCH --array=0-1\n" in (home / "dry-run/atom-smoke/rlvr.servers.sh").read_text()

    # the stage's job alone is ended for good: its servers end, too
    atom(home, "submit", *only)
    slurm_fixtures.until(lambda: steps(home) >= 1, "a step with the first server", PATIENCE)
    (first,) = rows(home)
    slurm_fixtures.slurm("scancel", first["job"])
    slurm_fixtures.until(lambda: not queued(*first["servers"]), "the end of the servers of a canceled stage", 120)

    # `atom cancel` ends both
    atom(home, "submit", *only)
    second = rows(home)[-1]
    slurm_fixtures.until(lambda: "RUNNING" in queued(*second["servers"]), "servers once the stage runs", PATIENCE)
    atom(home, "cancel")
    slurm_fixtures.until(lambda: not queued(*second["servers"]) and not queued(second["job"]), "the end of all", 120)

    # one is canceled in the middle, and the other goes on; then that one is started again, and the stage waits for it
    atom(home, "submit", *only)
    third = rows(home)[-1]
    slurm_fixtures.until(lambda: len(announced(home)) == 2, "both servers", PATIENCE)
    stage = next(stage for stage in status(home)["stages"] if stage["name"] == "rlvr")
    assert stage["servers"] == "2 running", stage
    before = steps(home)
    slurm_fixtures.until(lambda: steps(home) > before, "a step with both servers", PATIENCE)
    slurm_fixtures.slurm("scancel", f"{third['servers'][1]}_1")
    before = steps(home)
    slurm_fixtures.until(lambda: steps(home) >= before + 2, "steps with one server", PATIENCE)
    start = announced(home)["0"]["start"]
    if transfer == "folder":
        slurm_fixtures.slurm("scontrol", "requeue", f"{third['servers'][0]}_0")
    else:  # vLLM itself dies
        slurm_fixtures.kill(slurm_fixtures.processes(announced(home)["0"]["host"], b"vllm.entrypoints"))
    slurm_fixtures.until(lambda: announced(home).get("0", {}).get("start", start) > start, "the other start", PATIENCE)
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "rlvr"), "rlvr sealed", PATIENCE)
    slurm_fixtures.until(lambda: not queued(*third["servers"]), "the end of the servers", 120)
    (states,) = {stage["servers"] for stage in status(home)["stages"] if stage["name"] == "rlvr"}
    assert states == "1 cancelled, 1 completed"
    log = max(home.glob("logs/*/rlvr/events.jsonl"), key=lambda path: path.stat().st_mtime).read_text()
    assert "left out until it is back" in log and "waits for a vLLM server, at most 15 min" in log
    # by broadcast, the loss of the last server while it draws starts the stage again
    assert log.count('"event": "attempt"') == 1 or transfer == "broadcast"
