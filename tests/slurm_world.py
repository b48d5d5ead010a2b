"""A real Slurm cluster on this machine, and what the tests of it share: a home folder in which one two-node stage is left
to run, waiting for things to happen, and making them happen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from processors import STEERING

from pipeline.graph import recipe
from pipeline.launch import cluster_profile

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "tests/slurm/cluster"
PLACE = Path(os.environ.get("SLURM_TEST_DIR", ROOT / "build/slurm")).resolve()
PATIENCE = 240.0
ON_SLURM = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of the test cluster run as root"),
    pytest.mark.usefixtures("slurm"),
]
"""Marks of a module whose tests need the cluster."""


def cluster(action: str) -> None:
    process = subprocess.run([str(CLUSTER), action], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr


def slurm(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def write_profile(folder: Path, **changed: Any) -> str:
    """The profile `dev` with other settings of its section slurm."""
    packaged = Path(cluster_profile.__file__).parents[1] / "clusters" / "dev.yaml"
    body = yaml.safe_load(packaged.read_text())
    # Jobs compute as the runs here that they are compared with, whichever processor is pretended.
    body["slurm"]["environment"] |= {name: os.environ[name] for name in STEERING if name in os.environ}
    for name, value in changed.items():
        body["slurm"][name] = {**body["slurm"].get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def write_recipe(folder: Path, **pretrain: Any) -> str:
    """atom-smoke, pre-trained by two ranks that share the experts."""
    packaged = Path(recipe.__file__).parents[1] / "recipes" / "atom-smoke.yaml"
    body = yaml.safe_load(packaged.read_text())
    body["pretrain"]["batch"] = {"global_tokens": 1536, "micro_tokens": 768}
    body["pretrain"] |= {"parallelism": {"ranks": 2, "ep": 2}, "checkpoint_interval": 5, "steps": 120, **pretrain}
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def until(condition: Callable[[], Any], why: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{why} did not come about within {patience:.0f} s:\n{slurm('squeue', '-t', 'all')}")


def events(home: Path, stage: str) -> list[dict[str, Any]]:
    records = []
    for path in sorted(home.glob(f"logs/*/{stage}/events.jsonl")):
        records += [json.loads(line) for line in path.read_text().splitlines()]
    return records


def reached(home: Path, stage: str, steps: int, attempts: int = 1) -> bool:
    """Whether the attempt of that number has done so many steps."""
    rows = events(home, stage)
    starts = [i for i, row in enumerate(rows) if row["event"] == "attempt"]
    if len(starts) < attempts:
        return False
    return any(row["event"] == "progress" and row["done"] >= steps for row in rows[starts[attempts - 1] :])


def attempts(home: Path, stage: str) -> int:
    return len([row for row in events(home, stage) if row["event"] == "attempt"])


def job_of(home: Path, stage: str) -> str:
    rows = [
        json.loads(line) for path in sorted(home.glob("logs/*/jobs.jsonl")) for line in path.read_text().splitlines()
    ]
    return str([row["job"] for row in rows if row["node"] == stage][-1])


def array_of(home: Path, stage: str) -> str:
    rows = [json.loads(line) for path in home.glob("logs/*/jobs.jsonl") for line in path.read_text().splitlines()]
    return str(next(row["array"] for row in rows if row["node"] == stage))


def reached_shards(home: Path, stage: str) -> int:
    """How many shards of a stage its array has done."""
    shards_done: dict[str, int] = {}
    for path in sorted(home.glob(f"logs/*/{stage}/shards/ranks/*/shards.json")):
        shards_done[path.parent.name.split(".")[0]] = json.loads(path.read_text())["done"]
    return sum(shards_done.values())


def nodes_of(home: Path, stage: str) -> list[str]:
    """The nodes that a stage runs on, rank 0's first."""
    output = slurm("squeue", "-h", "-j", job_of(home, stage), "-o", "%N").strip()
    return slurm("scontrol", "show", "hostnames", output).split()


def processes(node: str, word: bytes = b"") -> list[int]:
    """The processes of a virtual node, told by their environment; word: that stands in their command line."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mine = f"SLURMD_NODENAME={node}".encode() in (path / "environ").read_bytes().split(b"\0")
            if mine and word in (path / "cmdline").read_bytes():
                pids.append(int(path.name))
    return pids


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def daemon(name: str) -> int:
    return int((PLACE / "run" / f"{name}.pid").read_text())


def stepds(job: str) -> list[int]:
    """Slurm's own supervisors of a job's steps."""
    listed = subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{job}\."], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def sealed(home: Path, stage: str) -> Path | None:
    folders = [
        path
        for path in home.glob(f"artifacts/{stage}-*/manifest.json")
        if re.fullmatch(rf"{stage}-[0-9a-f]{{12}}", path.parent.name)
    ]
    return folders[0] if folders else None


def digest(home: Path, stage: str) -> str:
    path = sealed(home, stage)
    assert path is not None, f"{stage} is not sealed"
    return str(json.loads(path.read_text())["digest"])


def with_shards(folder: Path, shards: int) -> str:
    """The recipe, with a data recipe whose sources are cut into so many shards."""
    recipe = Path(write_recipe(folder))
    body = yaml.safe_load(recipe.read_text())
    data = yaml.safe_load((ROOT / "data_recipes/smoke.yaml").read_text())
    data["curation"] = {**data.get("curation", {}), "shards": shards}
    (folder / "cut.yaml").write_text(yaml.safe_dump(data))
    recipe.write_text(yaml.safe_dump({**body, "data": "cut.yaml"}))
    return str(recipe)
