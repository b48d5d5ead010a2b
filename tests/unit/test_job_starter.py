"""The process that starts jobs: a launcher that is not answered, or is interrupted meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from pipeline.core.errors import MachineError
from pipeline.launch import job_starter
from pipeline.launch.job_starter import JobStarter


@pytest.fixture
def starter(tmp_path: Path) -> JobStarter:
    """A starter whose process hangs in an import once, and then no more."""
    hang = "import os, time\nif not os.path.exists({0!r}):\n    open({0!r}, 'w').close()\n    time.sleep(600)\n"
    (tmp_path / "hangs.py").write_text(hang.format(str(tmp_path / "hung")))
    return JobStarter(
        ["env", f"PYTHONPATH={tmp_path}{os.pathsep}{Path(__file__).parents[2]}", sys.executable], ["hangs"]
    )


def is_answered(starter: JobStarter, folder: Path) -> bool:
    """Returns True if a job without ranks starts, whose controller ends at once."""
    try:
        return starter.start(folder, {}, 0).pid > 0
    finally:
        starter.close()


def test_a_process_that_does_not_answer_is_an_error_and_the_next_job_gets_another(
    starter: JobStarter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(job_starter, "ANSWER_SECONDS", 2.0)
        with pytest.raises(MachineError, match="has not answered for 2 s"):
            starter.start(tmp_path, {}, 0)
        assert starter._process is None
    (tmp_path / "hung").touch()
    assert is_answered(starter, tmp_path)


def test_an_interrupted_start_ends_the_process(starter: JobStarter, tmp_path: Path) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(2.0, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        starter.start(tmp_path, {}, 0)
    assert starter._process is None, "the next job would read the answer to this one"
    (tmp_path / "hung").touch()
    assert is_answered(starter, tmp_path)
