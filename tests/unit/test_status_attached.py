"""`atom status` of a run that waits for another run's job shows the cause that the job's script recorded there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import Run
from pipeline.launch.rendezvous import Decision, Verdict
from pipeline.tracking import status
from tests.fixtures import slurm_line_fixtures

KEY = "filter-0123456789ab"
CAUSE = "module cuda/12.8 of the cluster profile failed with exit code 1 on each of n1,n4"


def write_run(store: Store, id: str, attached: bool, job: str = "7") -> Run:
    folder = store.logs / id
    folder.mkdir(parents=True)
    nodes = [{"name": "filter", "stage": "filter", "key": KEY}]
    body = {"id": id, "recipe": "r", "version": "1", "recipe_path": "r.yaml", "profile": "dev", "nodes": nodes}
    body["launcher"] = "slurm"
    (folder / "run.json").write_text(json.dumps(body))
    (folder / "jobs.jsonl").write_text(json.dumps({"node": "filter", "job": job, "attached": attached}) + "\n")
    return runs.find(store, id)


@pytest.mark.parametrize(("owner", "shown"), [("first", CAUSE), ("../logs/first", "failed exit code 2")])
def test_the_cause_of_a_job_of_another_run(
    owner: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's name in a job's comment is anybody's text: it is no path."""
    store, command = Store(tmp_path / "home"), f"atom {owner} filter {KEY}"
    queued = slurm_line_fixtures.squeue("7", "FAILED", "", "", "NonZeroExitCode", comment=command, command="(null)")
    ended = f"7|FAILED|2:0|n1|0:01|root|None||{command}"
    monkeypatch.setenv("PATH", slurm_line_fixtures.programs(tmp_path / "bin", squeue=queued, sacct=ended))
    launch = write_run(store, "first", attached=False).folder / "filter/ranks/7.0"
    launch.mkdir(parents=True)
    Verdict(Decision.FAILED, CAUSE).write(launch)
    (node,), lack = status.status(write_run(store, "second", attached=True), store)
    assert (node.state, node.message, lack) == ("failed", shown, None)
