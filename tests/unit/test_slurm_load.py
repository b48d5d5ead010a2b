"""How often Slurm's controller is asked: by what redraws, and by what many processes of a run do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph.run import Run
from pipeline.launch import slurm_client
from pipeline.launch.slurm_client import Answers, NoAnswer, Owner
from pipeline.tracking import snapshot

STAGES = 30


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of many stages on Slurm: one waits for drained nodes, one is out of memory, the others have ended."""
    names = [f"stage{n}" for n in range(STAGES)]
    nodes = [{"name": name, "stage": "acquire", "key": f"{name}-0123456789ab", "inputs": {}} for name in names]
    run = Run("tiny-1", tmp_path / "logs/tiny-1", {"id": "tiny-1", "recipe": "tiny", "nodes": nodes})  # type: ignore[typeddict-item]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("{}")  # its owner is the run's
    for n, name in enumerate(names):
        run.note_job(name, str(n + 1), False)
    waits = f"1|PENDING||0:00|ReqNodeNotAvail|root|{Owner(run.id, names[0], nodes[0]['key']).comment}"
    ended = f"2|OUT_OF_MEMORY|0:125|n1|1:00|root|{Owner(run.id, names[1], nodes[1]['key']).comment}"
    (tmp_path / "bin").mkdir()
    for name, line in {"squeue": waits, "sacct": ended, "sinfo": "n1|bad fan"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/calls\necho '{line}'\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return run


def calls(home: Path) -> Counter[str]:
    return Counter((home / "calls").read_text().split())


def test_a_minute_of_redrawing_asks_for_each_thing_six_times(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, now = Answers(slurm_client.ASK_EVERY), [0.0]
    monkeypatch.setattr(slurm_client.time, "monotonic", lambda: now[0])
    for look in range(30):
        now[0] = 2.0 * look
        taken = snapshot.take(run, Store(tmp_path), answers)
        assert taken.stages[0].status.reason and "bad fan" in taken.stages[0].status.reason
        assert "ran out" in taken.stages[1].status.message
    assert calls(tmp_path) == {"squeue": 6, "sinfo": 6, "sacct": 12}, "of the jobs, and of the memory of one"
    for look in range(100):  # the jobs of each look are others
        now[0] = 100.0 + slurm_client.ASK_EVERY * look
        answers.finished_jobs([str(look)])
    assert len(answers._kept) == 1, "no answer is kept for longer than it counts"


def test_one_look_asks_a_few_times_however_many_stages_there_are(run: Run, tmp_path: Path) -> None:
    snapshot.take(run, Store(tmp_path))
    assert calls(tmp_path) == {"squeue": 1, "sinfo": 1, "sacct": 2}


def test_that_slurm_does_not_answer_is_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request to a controller that is down takes half a minute."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho squeue >> {tmp_path}/calls\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers = Answers(60.0)
    for _ in range(5):
        with pytest.raises(NoAnswer, match="squeue failed"):
            answers.queued_jobs()
    assert calls(tmp_path) == {"squeue": 1}
