"""A rank that is really slowed down, by signals from outside, is named within ten steps."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

from tests.fixtures import layout_fixtures
from tests.fixtures.run_fixtures import at_length


def finished_steps(folder: Path) -> int:
    logs = list(folder.glob("work/attempt-*/training.jsonl"))
    return logs[0].read_text().count('"loss"') if logs else 0


@at_length("training", 60)
def test_a_slow_rank_is_named_within_ten_steps(corpus: Path, tmp_path: Path) -> None:
    settings = layout_fixtures.settings_of({"ep": 2}, 2, steps=12)
    processes = layout_fixtures.start(corpus, tmp_path / "slow", settings)
    began: list[int] = []

    def slow_down() -> None:
        """Stops rank 1 for most of the time, for ten steps from its first one on."""
        while processes[1].poll() is None and not (began and finished_steps(tmp_path / "slow") > began[0] + 10):
            if not began:
                if steps := finished_steps(tmp_path / "slow"):
                    began.append(steps)
                time.sleep(0.005)
                continue
            for number, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.05)):
                os.kill(processes[1].pid, number)
                time.sleep(seconds)

    thread = threading.Thread(target=slow_down)
    thread.start()
    codes, logs = layout_fixtures.end(processes)
    thread.join()
    assert codes == [0, 0], logs
    place = f"slow: rank 1 on {re.escape(socket.gethostname())}"
    named = re.search(rf"{place} (?:computes|waits for data) ([\d.]+) times .* since step (\d+)", logs[0])
    assert named is not None and float(named[1]) > 1.2, logs[0]
    assert int(named[2]) + 4 <= began[0] + 10, (began, named[0])
