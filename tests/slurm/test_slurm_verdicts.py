"""On a real Slurm cluster: a verdict of one rank ends the processes of all nodes within seconds, is reported by `atom status`,
and what would fail again is not started again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.core import source_code
from pipeline.core.errors import Kind
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.run import Run
from pipeline.launch import cluster_profile, slurm
from pipeline.launch.batch_script import RunScripts
from pipeline.launch.job import JobLimits
from tests.fixtures import slurm_fixtures, verdict_fixtures
from tests.fixtures.run_fixtures import SOAK, atom

pytestmark = slurm_fixtures.ON_SLURM

VERDICTS = {
    "preflight": ("sleep", 0, Kind.MACHINE, "GB free in "),
    "budget": ("sleep", 1, Kind.USER, "the budget of 0 core hours is used up"),
    "standstill": ("sleep", 2, Kind.BUG, "3 attempts ended at the start without getting further"),
    "check": ("check", 1, Kind.CHECK, "rank 1: the weights that come back are others"),
    "user": ("user", 0, Kind.USER, "recipe r: this cannot be"),
    "bug": ("bug", 3, Kind.BUG, "rank 3: a bug in stage failing: KeyError"),
    "hang": ("abandon", 2, Kind.MACHINE, "rank 2: no step was finished for 5 s"),
}


def start(folder: Path, name: str, retried: int) -> tuple[Store, Run, str]:
    """Submits the stage that fails so, on four nodes; returns its home folder, run and job."""
    way, failing_rank, *_ = VERDICTS[name]
    environment = {"PYTHONPATH": f"{slurm_fixtures.ROOT}:{verdict_fixtures.python_path(folder)}"}
    settings = cluster_profile.load(slurm_fixtures.write_profile(folder, restarts=retried, environment=environment))
    store, graph = Store(folder / "home"), verdict_fixtures.graph(folder / "act", way, failing_rank)
    (node,) = graph.nodes.values()
    run = runs.start(graph, store, [node.name], "dev", {"launcher": "slurm"})
    if name == "standstill":
        run.node_folder(node.name).mkdir()
        (run.node_folder(node.name) / "events.jsonl").write_text('{"time": 1.0, "event": "attempt"}\n' * 3)
    limits = {"gpu_hours": None, "core_hours": 0.0} if name == "budget" else None
    free = 1e9 if name == "preflight" else 0.0
    terms = JobLimits(limits, retried, free, None)
    script = RunScripts(store, run, settings.cluster(), source_code.freeze(store, {})).of_stage(node, [])
    job = slurm.start(script, slurm.task_of(graph, store, run, node, settings), terms)
    run.note_job(node.name, job, False)
    return store, run, job


@pytest.mark.parametrize("name", VERDICTS if SOAK else ("preflight", "budget", "bug", "hang"))
def test_a_verdict_ends_every_node_within_seconds_and_is_reported(name: str, tmp_path: Path) -> None:
    _, _, kind, sentence = VERDICTS[name]
    store, run, job = start(tmp_path, name, retried=3 if kind.final else 0)
    (folder,) = [run.node_folder(node["name"]) for node in run.body["nodes"]]
    launch = slurm_fixtures.until(lambda: next(folder.glob("ranks/*"), None), "a start")

    def over() -> bool:
        return "RUNNING" not in slurm_fixtures.slurm("squeue", "-h", "-j", job, "-o", "%T")

    end = verdict_fixtures.last_end(launch, over=over)
    acted = tmp_path / "act" / "acted"  # a verdict before the stage begins is known once the last rank has started
    begun = [acted] if acted.exists() else list(launch.glob("started-*"))
    since = max(path.stat().st_mtime for path in begun)
    end.require_promise(name, since)
    slurm_fixtures.until(over, "its end")
    print(f"{name}: {time.time() - since:.2f} s to free nodes")

    def state() -> dict | None:
        (stage,) = json.loads(atom(store.home, "status", "--json").stdout)["stages"]
        assert stage["state"] != "running", stage
        return stage if stage["state"] == "failed" else None

    stage = slurm_fixtures.until(state, "a failure that is reported")
    assert sentence in stage["message"] and stage["kind"] == kind, stage
    code = slurm_fixtures.slurm("sacct", "-n", "-X", "-P", "-j", job, "-o", "ExitCode").strip()
    assert code == ("1:0" if kind is Kind.CHECK else "2:0")
    assert [path.name for path in folder.glob("ranks/*")] == [launch.name], "it is not started again"
