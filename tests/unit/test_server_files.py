"""Servers in jobs of their own are found by their files: those that live, of this run, each once."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import json_files, lease
from pipeline.core.errors import MachineError
from stages.generation import server_jobs
from stages.generation.server_jobs import Announced

ONE = Announced("run-1", "http://n1:8000", "n1", "7", 0)
TWO = Announced("run-1", "http://n2:8000", "n2", "7", 1)


def write(folder: Path, number: int, server: Announced, age: float = 0.0, **changed: Any) -> None:
    path = folder / f"server-{number}.json"
    path.write_text(json.dumps({**vars(server), **changed}))
    now = lease.file_system_time(folder)
    os.utime(path, (now - age, now - age))


def test_an_announced_server_is_found_until_its_block_ends(tmp_path: Path) -> None:
    with server_jobs.announced(tmp_path, 0, ONE):
        with server_jobs.announced(tmp_path, 1, TWO):
            assert server_jobs.read(tmp_path, "run-1") == [ONE, TWO]
        assert server_jobs.read(tmp_path, "run-1") == [ONE]
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_keeps_a_server_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_jobs, "HEARTBEAT", 0.02)
    with server_jobs.announced(tmp_path, 0, ONE):
        os.utime(tmp_path / "server-0.json", (1, 1))
        deadline = time.monotonic() + 20
        while server_jobs.read(tmp_path, "run-1") != [ONE]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (tmp_path / "server-0.json").unlink()  # it stays away: another server may have the number
        time.sleep(0.1)
        assert server_jobs.read(tmp_path, "run-1") == []


def test_a_stale_heartbeat_leaves_a_server_out_whatever_the_clocks_say(tmp_path: Path) -> None:
    write(tmp_path, 0, ONE, age=lease.EXPIRY + 5)
    write(tmp_path, 1, TWO, age=lease.EXPIRY - 30)
    assert server_jobs.read(tmp_path, "run-1") == [TWO]


def test_of_two_files_of_one_server_the_fresher_counts(tmp_path: Path) -> None:
    write(tmp_path, 0, ONE, age=20)
    write(tmp_path, 1, ONE, age=5, job="8", start=2)
    assert server_jobs.read(tmp_path, "run-1") == [Announced("run-1", ONE.url, "n1", "8", 2)]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "it is empty"),
        (b'{"run": "run-1", "url": "http://n1:8000"', "it is no JSON"),
        (b'{"run": "\xff"}', "it is no"),
        (b"[]", "Input should be a valid dictionary"),
        (json.dumps({**vars(ONE), "url": "file:///etc/passwd"}).encode(), "url: String should match pattern"),
        (json.dumps({**vars(ONE), "start": "1"}).encode(), "start: Input should be a valid integer"),
        (json.dumps({**vars(ONE), "more": 1}).encode(), "more: Extra inputs are not permitted"),
        (b" " * 200_000, "it has more than 100,000 bytes"),
    ],
)
def test_a_damaged_file_is_named_and_the_other_servers_are_found(tmp_path: Path, content: bytes, why: str) -> None:
    write(tmp_path, 0, TWO)
    (tmp_path / "server-1.json").write_bytes(content)
    with pytest.warns(json_files.DamagedFile, match=rf"server-1\.json is damaged \(.*{why}.*its server is left out"):
        assert server_jobs.read(tmp_path, "run-1") == [TWO]


def test_a_file_of_another_run_is_named_and_what_is_no_servers_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, 0, ONE, run="run-0")
    write(tmp_path, 1, TWO)
    for name in ("config.json", ".server-2.json.0123", "server-x.json", "server-3.json.tmp"):
        (tmp_path / name).write_text("{")
    (tmp_path / "server-4").mkdir()
    with pytest.warns(json_files.DamagedFile, match=r"server-0\.json is of run run-0, not of run-1"):
        assert server_jobs.read(tmp_path, "run-1") == [TWO]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert server_jobs.read(tmp_path, "run-1") == [TWO], "it was said twice"


def test_a_folder_that_a_node_does_not_see_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="elsewhere cannot be used .*see whether this node mounts the file system$"):
        server_jobs.read(tmp_path / "elsewhere", "run-1")
