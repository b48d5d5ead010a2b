"""Arrays of jobs over parts, on a real Slurm: the same bytes as in one process, whatever happens to tasks and nodes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import crash, finished_stages, status
from tests.fixtures.run_fixtures import SOAK, at_length, atom

pytestmark = slurm_fixtures.ON_SLURM
MAPS = ("acquire-docstrings", "filter", "dedup", "tokenize")
"""The stages whose arrays have a task for each part."""


def kill_tasks(at_least: int) -> None:
    """Kills the tasks that run, as soon as there are so many."""

    def tasks() -> list[int]:
        pids = [pid for n in range(1, 5) for pid in slurm_fixtures.processes(f"n{n}", b"submitit.core._submit")]
        return pids if len(pids) >= 2 * at_least else []  # each with its srun

    slurm_fixtures.kill(slurm_fixtures.until(tasks, f"{at_least} tasks"))


@at_length("slurm-parts", 80)
@pytest.mark.parametrize("parts, tasks", [(1000, 3), (3, 1000), (8, 8), (6, 3)] if SOAK else [(3, 3)])
def test_an_array_gives_the_same_bytes_as_one_process(tmp_path: Path, parts: int, tasks: int) -> None:
    home, alone, recipe = tmp_path / "home", tmp_path / "alone", slurm_fixtures.with_parts(tmp_path, parts)
    cluster, size = slurm_fixtures.write_profile(tmp_path, array_size=tasks), min(tasks, parts)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize", "--dry-run")
    script = (home / "dry-run/atom-smoke/acquire-docstrings.shards.sh").read_text()
    assert f"#SBATCH --array=0-{size - 1}%{size}\n" in script
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    if size == 3:  # tasks that are killed are done again
        kill_tasks(3)
    atom(alone, "run", recipe, "--until", "tokenize")
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "tokenize"), "tokenize sealed", 20 * 60 if SOAK else 240)
    stages = {stage["name"]: stage for stage in status(home)["stages"]}
    for stage in (*MAPS, "duplicates", "representatives"):
        assert slurm_fixtures.digest(home, stage) == slurm_fixtures.digest(alone, stage), stage
        assert len(list(home.glob(f"logs/*/{stage}/shards/submitit/*_submission.sh"))) == 1, "one submission"
        assert slurm_fixtures.array_of(home, stage).isdigit() and stages[stage]["state"] == "sealed"
    assert slurm_fixtures.reached_shards(home, "acquire-docstrings") == parts
    body = next(json.loads(path.read_text()) for path in home.glob("ledger/acquire-docstrings-*/*.json"))
    usage = next(x for x in body["predicate"]["runDetails"]["byproducts"] if x["name"] == "usage")["annotations"]
    assert usage["ranks_counted"] == size + 1


@at_length("slurm-parts", 900)
@pytest.mark.timeout(2700)
def test_a_thousand_parts_two_kills_a_dead_node_and_a_poison_document(tmp_path: Path) -> None:
    """All tasks are killed twice, and the node of one dies; a document that no reader can parse is removed with its
    reason."""
    home, alone = tmp_path / "home", tmp_path / "alone"
    recipe = slurm_fixtures.with_parts(tmp_path, 1000, poison=True)
    cluster = slurm_fixtures.write_profile(tmp_path, array_size=100, restarts=5)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "filter")
    for _ in range(2):
        kill_tasks(3)
        time.sleep(5)
    node = slurm_fixtures.until(lambda: slurm_fixtures.running_node(home, "acquire-docstrings"), "a task on a node")
    crash(node)
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "filter"), "filter sealed", 30 * 60)
    atom(alone, "run", recipe, "--until", "filter")
    for stage in ("acquire-docstrings", "filter"):
        assert slurm_fixtures.digest(home, stage) == slurm_fixtures.digest(alone, stage), stage
        assert len(list(home.glob(f"logs/*/{stage}/shards/submitit/*_submission.sh"))) == 1, "one submission"
    assert "failed/parse" in atom(home, "logs", "filter").stdout


@at_length("slurm-parts", 90)
def test_a_damaged_input_is_reported_and_stops_what_waits(tmp_path: Path) -> None:
    home, recipe = tmp_path / "home", slurm_fixtures.with_parts(tmp_path, 2)
    atom(home, "run", recipe, "--until", "acquire-docstrings")
    atom(home, "run", recipe, "--until", "acquire-sums")
    documents = next(home.glob("artifacts/acquire-sums-*/documents/part-00000.parquet"))
    documents.write_bytes(b"x" * documents.stat().st_size)
    cluster = slurm_fixtures.write_profile(tmp_path, restarts=0)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    stages = slurm_fixtures.until(lambda: finished_stages(home), "an end")
    assert stages["filter"]["state"] == "failed"
    assert re.match(
        r"its inputs: artifact acquire-sums-\S+ file documents/part-00000.parquet is damaged",
        stages["filter"]["message"],
    ), stages
    assert stages["dedup"]["state"] == stages["tokenize"]["state"] == "cancelled"
