"""Arrays of jobs over shards, on a real Slurm: the same bytes as in one process, tasks that are killed, shards that fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import finished_stages, status
from tests.fixtures.run_fixtures import SOAK, atom

pytestmark = slurm_fixtures.ON_SLURM


@pytest.fixture
def acquired(upstream: Path, tmp_path: Path) -> Path:
    """A home folder in which all is sealed that comes before curation."""
    home = tmp_path / "home"
    for path in (p for kind in ("artifacts", "ledger") for p in (upstream / kind).iterdir()):
        if path.name.startswith(("acquire-", "items-")):
            shutil.copytree(path, home / path.parent.name / path.name)
    return home


@pytest.mark.parametrize("shards, tasks", [(1000, 3), (3, 1000), (8, 8)] if SOAK else [(40, 3)])
def test_curation_in_an_array_gives_the_same_bytes(
    acquired: Path, upstream: Path, tmp_path: Path, shards: int, tasks: int
) -> None:
    home, recipe = acquired, slurm_fixtures.with_shards(tmp_path, shards)
    cluster, size = slurm_fixtures.write_profile(tmp_path, array_size=tasks), min(tasks, shards)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize", "--dry-run")
    script = (home / "dry-run/atom-smoke/filter.shards.sh").read_text()
    assert f"#SBATCH --array=0-{size - 1}%{size}\n" in script
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    if size == 3:  # tasks that are killed are done again
        word = b"submitit.core._submit"

        def three() -> list[int]:
            pids = [pid for n in range(1, 5) for pid in slurm_fixtures.processes(f"n{n}", word)]
            return pids if len(pids) >= 6 else []  # each with its srun

        slurm_fixtures.kill(slurm_fixtures.until(three, "three tasks"))
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "tokenize"), "tokenize sealed")
    for stage, pieces in (("filter", shards), ("dedup", 14), ("tokenize", shards)):  # 14 buckets of MinHash
        assert slurm_fixtures.digest(home, stage) == slurm_fixtures.digest(upstream, stage)
        assert len(list(home.glob(f"logs/*/{stage}/shards/submitit/*_submission.sh"))) == 1, "one submission"
        assert slurm_fixtures.reached_shards(home, stage) == pieces and slurm_fixtures.array_of(home, stage).isdigit()
        assert {s["name"]: s for s in status(home)["stages"]}[stage]["state"] == "sealed"
    body = next(json.loads(path.read_text()) for path in home.glob("ledger/filter-*/*.json"))
    usage = next(x for x in body["predicate"]["runDetails"]["byproducts"] if x["name"] == "usage")["annotations"]
    assert usage["ranks_counted"] == size + 1


def test_shards_here_give_the_same_bytes_too(upstream: Path, tmp_path: Path) -> None:
    atom(tmp_path / "home", "run", slurm_fixtures.with_shards(tmp_path, 5), "--until", "tokenize")
    for stage in ("filter", "dedup", "tokenize"):
        assert slurm_fixtures.digest(tmp_path / "home", stage) == slurm_fixtures.digest(upstream, stage)


def test_a_damaged_input_is_reported_and_stops_what_waits(acquired: Path, tmp_path: Path) -> None:
    home, recipe, cluster = (
        acquired,
        slurm_fixtures.with_shards(tmp_path, 2),
        slurm_fixtures.write_profile(tmp_path, restarts=0),
    )
    documents = next(home.glob("artifacts/acquire-sums-*/documents.parquet"))
    documents.write_bytes(b"x" * documents.stat().st_size)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    stages = slurm_fixtures.until(lambda: finished_stages(home), "an end")
    assert stages["filter"]["state"] == "failed"
    assert re.match(
        r"its inputs: artifact acquire-sums-\S+ file documents.parquet is damaged", stages["filter"]["message"]
    ), stages
    assert stages["dedup"]["state"] == stages["tokenize"]["state"] == "cancelled"
