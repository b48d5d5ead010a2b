"""The end of a run of the tests: skipped tests are counted by reason, and a missing sandbox is an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis

from tests.fixtures import ROOT

TESTS = """
import pytest
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

PART = "training"

@at_length(PART, 20)
def test_long(): ...

@at_length(PART, 400)
def test_longer(): ...

def test_without_its_program():
    pytest.skip("there is no chromium here")

@NEEDS_BUBBLEWRAP
def test_of_the_sandbox(): ...

@NEEDS_BUBBLEWRAP
def test_another_of_the_sandbox(): ...
"""


def test_generated_examples_have_no_deadline() -> None:
    assert hypothesis.settings().deadline is None


def test_reasons_are_counted_and_a_missing_bubblewrap_is_no_reason(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(TESTS)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    process = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    assert [line for line in lines if " skipped: " in line] == [
        "2 skipped: takes long: run by `make soak PART=training`",
        "1 skipped: there is no chromium here",
    ]
    sentence = "code of a model runs under bubblewrap, and there is no bwrap on PATH; apt-get install bubblewrap"
    assert lines.count(sentence) == 2 and "2 errors" in lines[-1] and "3 skipped" in lines[-1]
