"""Digests of source files are computed once for each version of a file, by any process, and recorded in the home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.json_files import DamagedFile
from pipeline.core.store import sha256_file
from stages.formats import file_digests

OTHER_PROCESS = """
import sys
from pathlib import Path
from stages.formats import file_digests
file_digests.SETTLED_SECONDS = 0
file_digests.sha256_file = lambda path: print("hashed", path.name) or "f" * 64
print(*file_digests.file_digests([Path(path) for path in sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(file_digests, "SETTLED_SECONDS", 0)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def by_another_process(*paths: Path) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, *map(str, paths)], capture_output=True, text=True, check=True
    )
    return process.stdout.split()


def test_another_process_reads_no_unchanged_file(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("one")
    b.write_text("two")
    digests = file_digests.file_digests([a, b])
    assert digests == [sha256_file(a), sha256_file(b)] == by_another_process(a, b)
    times = b.stat().st_atime_ns, b.stat().st_mtime_ns
    b.write_text("too")  # of the same size, and of the same time by its own account
    os.utime(b, ns=times)
    assert by_another_process(a, b) == ["hashed", "b.jsonl", digests[0], "f" * 64]


def test_a_damaged_record_is_replaced(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    file_digests.file_digests([path])
    (record,) = (home / "digests").iterdir()
    for damage in (b"{", b'{"folder": "x", "files": {"a.jsonl": "1 2 3 4 xyz"}}'):
        record.write_bytes(damage)
        with pytest.warns(DamagedFile, match="the files are hashed again"):
            assert file_digests.file_digests([path]) == [sha256_file(path)]
        assert list(json.loads(record.read_text())["files"]) == ["a.jsonl"]
    assert [entry.name for entry in (home / "digests").iterdir()] == [record.name]


def test_what_may_still_change_is_not_recorded(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_SECONDS", 3600)
    (tmp_path / "a.jsonl").write_text("one")
    file_digests.file_digests([tmp_path / "a.jsonl"])
    monkeypatch.setattr(file_digests, "SETTLED_SECONDS", 0)
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "none"))
    file_digests.file_digests([tmp_path / "a.jsonl"])
    assert not (home / "digests").exists() and not (tmp_path / "none").exists()
