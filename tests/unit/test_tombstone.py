"""Tombstones from strangers: what is no tombstone is a finding, and names no file outside its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from release.audit.verify import _taken_back, check_tombstone
from release.layout import RETRACTED, SUMS

FILE = {"path": "dataset/kept.json", "before": "0" * 64, "after": "1" * 64}
ROW = {"repository": "a/b-data", "branch": "main", "folder": "dataset", "checksums": "0" * 64, "files": [FILE]}
TOMBSTONE: dict[str, Any] = {
    "release": "b 0.1.0", "dates": {}, "count": 1, "documents": [], "repositories": [ROW], "trained": [], "removed": [],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    body = {"schema": 1, "retractions": [{**TOMBSTONE, **changes}]}
    (folder / RETRACTED).write_text(json.dumps(body))
    (folder / SUMS).write_text(f"{'1' * 64}  kept.json\n")
    return folder


def test_the_files_are_compared_with_the_tombstone(tmp_path: Path) -> None:
    assert check_tombstone(write(tmp_path), "dataset").ok
    assert _taken_back(tmp_path) == "1 document of b 0.1.0 taken back on request"
    for after in (None, hashlib.sha256().hexdigest()):
        changed = check_tombstone(
            write(tmp_path, repositories=[{**ROW, "files": [{**FILE, "after": after}]}]), "dataset"
        )
        assert changed.wrong == ["the files are of no repository that the tombstone names"]
    assert check_tombstone(write(tmp_path, repositories=[]), "dataset").ok is False


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "retracted.json"),
        ("[]", "is no tombstone"),
        ('{"schema": 2, "retractions": []}', "has schema 2, and this atom knows 1"),
        ('{"schema": 1, "retractions": [{}]}', "is no tombstone"),
        ('{"schema": 1, "retractions": []}', "names no retraction"),
        (json.dumps({"schema": 1, "retractions": [{**TOMBSTONE, "count": "many"}]}), "is no tombstone"),
    ],
)
def test_another_file_is_a_finding(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / RETRACTED).write_text(content)
    result = check_tombstone(tmp_path, "dataset")
    assert result.ok is False and problem in result.detail
