"""How often Slurm's controller is asked: by what redraws, and by what many processes of a run do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph.run import Run
from pipeline.launch import slurm_client
from pipeline.launch.slurm_client import Answers, NoAnswer
from pipeline.tracking import status
from tests.fixtures import slurm_line_fixtures

STAGES = 30


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of many stages on Slurm: one waits for drained nodes, one is out of memory, the others have ended."""
    names = [f"stage{n}" for n in range(STAGES)]
    nodes = [{"name": name, "stage": "acquire", "key": f"{name}-0123456789ab", "inputs": {}} for name in names]
    body = {"id": "tiny-1", "recipe": "tiny", "nodes": nodes, "launcher": "slurm"}
    run = Run("tiny-1", tmp_path / "logs/tiny-1", body)  # type: ignore[arg-type]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("{}")  # its owner is the run's
    for n, name in enumerate(names):
        run.note_job(name, str(n + 1), False)
    waits = slurm_line_fixtures.squeue("1", "PENDING", run.id, names[0], "ReqNodeNotAvail, UnavailableNodes:n1")
    ended = slurm_line_fixtures.sacct("2", "OUT_OF_MEMORY", run.id, names[1], "0:125")
    path = slurm_line_fixtures.programs(tmp_path / "bin", squeue=waits, sacct=ended)
    monkeypatch.setenv("PATH", path)
    return run


def calls(home: Path) -> Counter[str]:
    """How often each program was called."""
    return Counter(line.split()[0] for line in (home / "bin/calls").read_text().splitlines())


def test_a_minute_of_redrawing_asks_for_each_thing_six_times(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, now = Answers(slurm_client.ASK_EVERY), [0.0]
    monkeypatch.setattr(slurm_client.time, "monotonic", lambda: now[0])
    for look in range(30):
        now[0] = 2.0 * look
        taken = status.take(run, Store(tmp_path), answers)
        assert taken.stages[0].status.reason and "sinfo -R" in taken.stages[0].status.reason
        assert "ran out" in taken.stages[1].status.message
    assert calls(tmp_path) == {"squeue": 6, "sacct": 6}
    for look in range(100):  # the jobs of each look are others
        now[0] = 100.0 + slurm_client.ASK_EVERY * look
        answers.ask(slurm_client.finished_jobs, (str(look),))
    assert len(answers._kept) == 1, "no answer is kept for longer than it counts"


def test_one_look_asks_a_few_times_however_many_stages_there_are(run: Run, tmp_path: Path) -> None:
    status.take(run, Store(tmp_path))
    assert calls(tmp_path) == {"squeue": 1, "sacct": 1}


def test_slurm_is_asked_for_the_jobs_of_the_run_alone(run: Run, tmp_path: Path) -> None:
    """By a user, or by one id: for anything else squeue takes the jobs of the whole cluster from the controller."""
    status.take(run, Store(tmp_path))
    requests = [line for line in (tmp_path / "bin/calls").read_text().splitlines() if line.startswith("squeue")]
    assert [request.partition(" -O")[0] for request in requests] == [f"squeue -h -t all -u {run.owner}"]
    run.note_job("stage3", "77", True, user="ann")
    status.take(run, Store(tmp_path))
    requests = [line for line in (tmp_path / "bin/calls").read_text().splitlines() if line.startswith("squeue")]
    assert {request.partition(" -u ")[2].split()[0] for request in requests[1:]} == {run.owner, "ann"}


def test_that_slurm_does_not_answer_is_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request to a controller that is down takes half a minute."""
    monkeypatch.setenv("PATH", slurm_line_fixtures.programs(tmp_path / "bin", squeue=""))
    with open(tmp_path / "bin/squeue", "a") as program:
        program.write("exit 1\n")
    answers = Answers(60.0)
    for _ in range(5):
        with pytest.raises(NoAnswer, match="squeue failed"):
            answers.ask(slurm_client.queued_jobs, ("ann",))
    assert calls(tmp_path) == {"squeue": 1}
