"""A process that starts before its inputs exist: it is admitted by its launcher, or ends with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.launch.early_start import EarlyStart

WAIT = """
import sys
from pipeline.launch.early_start import EarlyStart
print(EarlyStart(sys.argv[1], int(sys.argv[2])).wait(["graphlib", "no_such_module"]), "graphlib" in sys.modules)
"""


def waiting(gate: Path, launcher: subprocess.Popen[bytes]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAIT, str(gate), str(launcher.pid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_it_waits_until_it_is_admitted(tmp_path: Path) -> None:
    """A module that cannot be loaded does not end it: the stage reports that."""
    gate = EarlyStart.at(tmp_path / "gate")
    with subprocess.Popen(["sleep", "60"]) as launcher:
        process = waiting(tmp_path / "gate", launcher)
        gate.admit()
        assert process.communicate(timeout=60)[0] == "True True\n"
        launcher.kill()


def test_it_ends_with_its_launcher(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as launcher:
        process = waiting(tmp_path / "gate", launcher)
        assert process.poll() is None
        launcher.kill()
        launcher.wait()
        assert process.communicate(timeout=60)[0] == "False True\n"


def test_a_gate_of_an_earlier_start_is_closed(tmp_path: Path) -> None:
    EarlyStart.at(tmp_path / "gate").admit()
    EarlyStart.at(tmp_path / "gate")
    assert not (tmp_path / "gate").exists()
