"""Uploads of many files: killed and finished without sending a file twice, and below the Hub's limit on commits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from release.hub.local.server import LOCAL_TOKEN, running
from release.hub.upload import COMMITS, Difference, _chunks
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import at_length

MANY = [160, pytest.param(10_000, marks=at_length("release", 600))]
LIMITED = """
import sys
from pathlib import Path
from pipeline.core.errors import MachineError
from pipeline.hub import client
from pipeline.hub.client import RemoteRepository
from release.hub.upload import Destination, Journal
from release.repositories import Repository
client.MAX_RETRY_SECONDS = 1.0
folder = Path(sys.argv[1])
for name in range(120):
    (folder / f"{name:03d}.json").write_text(str(name))
journal = Journal(folder.with_suffix(".jsonl"))
destination = Destination(folder, Repository("", "", "dataset"), RemoteRepository("local/b", "dataset"), "v1", journal)
try:
    destination.upload(lambda text: None)
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize("count", [1, 50, 51, 5_000, 5_001, 10_000, 100_000])
def test_commits_stay_below_the_hubs_limit(count: int) -> None:
    names = [f"{number:06d}" for number in range(count)]
    chunks = _chunks(Difference([*names, SUMS, PUBLIC_KEY, SIGNATURE], []), count)
    assert [name for chunk in chunks[:-1] for name in chunk] == names and chunks[-1] == [SUMS, PUBLIC_KEY, SIGNATURE]
    assert len(chunks) - 1 <= COMMITS < 128 and max(map(len, chunks)) <= max(50, -(-count // COMMITS))
    done = sum(map(len, chunks[: len(chunks) // 3]))  # before a kill
    later = _chunks(Difference([*names[done:], SUMS], []), count)
    assert len(chunks) // 3 + len(later) == len(chunks)


@pytest.mark.parametrize("count", MANY)
def test_no_file_is_sent_twice_after_a_kill(count: int) -> None:
    command = [sys.executable, str(ROOT / "bench/upload.py"), "--files", str(count)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    (size,) = result["sizes"]
    assert result["ratio"] == 1 and size["objects"] == count * 9 // 10 and size["objects_sent_again"] == 0
    assert size["commits"] == -(-count // max(50, -(-count // COMMITS))) == size["requests"]["POST commit"]
    assert 0 < size["sent_by_the_second"] < count and size["sent_without_change"] == 0
    assert size["megabytes"] < 250


def test_a_hub_that_takes_no_more_commits_this_hour(tmp_path: Path) -> None:
    """The upload ends with a sentence, and goes on where it stopped."""
    (tmp_path / "files").mkdir()
    code = [sys.executable, "-P", "-c", LIMITED, str(tmp_path / "files")]
    sentences = []
    for most in ("2", "128"):
        with running(tmp_path / "hub", "local", LOCAL_TOKEN, "--commits-per-hour", most) as endpoint:
            environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": LOCAL_TOKEN, "PYTHONPATH": str(ROOT)}
            process = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        sentences.append(process.stdout.strip())
    assert "answers 429: You have exceeded the rate limit for repository commits (2 per hour)" in sentences[0]
    assert sentences[0].count("\n") == 0 and not sentences[1]
    journal = [json.loads(line) for line in (tmp_path / "files.jsonl").read_text().splitlines()]
    sent = [name for row in journal if row["call"] == "create_commit" for name in row["files"]]
    assert sorted(sent) == [f"{name:03d}.json" for name in range(120)]
