"""The second verifier, as an auditor runs it from `evidence/`: a sound release passes, and each change is reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.store import canonical
from release import independent_verifier
from release.assembly import build_release as builder
from tests.fixtures import release_fixtures
from tests.fixtures.release_fixtures import resum


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"), parts=3)
    return builder.build(source, tmp_path_factory.mktemp("home"))


def run(folder: Path) -> tuple[int, list[str]]:
    script = folder / "evidence/independent_verifier.py"
    done = subprocess.run([sys.executable, "-I", script, folder], capture_output=True, text=True, check=False)
    assert not done.stderr or done.returncode == 2, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_sound_release(release: Path) -> None:
    code, lines = run(release)
    assert code == 0, lines
    checks = ["checksums", "provenance", "statements", "documents", "merkle_roots", "order", "scores", "rollouts"]
    assert lines == [f"{name}: sound" for name in checks]


def test_it_shares_no_code_and_is_short() -> None:
    lines = Path(independent_verifier.__file__).read_text().splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"pyarrow"} and len(lines) <= 300


def test_another_folder_is_one_sentence(tmp_path: Path, release: Path) -> None:
    shutil.copytree(release / "evidence", tmp_path / "evidence")
    shutil.copy(release / "evidence/independent_verifier.py", tmp_path)
    for text in ('{"format": 3}', "[]", "{"):
        (tmp_path / "evidence/release.json").write_text(text)
        assert run(tmp_path) == (2, [])
    shutil.copytree(release / "evidence", tmp_path / "taken-back/evidence")
    (tmp_path / "taken-back/dataset").mkdir()
    (tmp_path / "taken-back/dataset/retracted.json").write_text("{}")
    assert run(tmp_path / "taken-back") == (2, [])


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def first(folder: Path, pattern: str) -> Path:
    """The first table with rows."""
    return next(path for path in sorted(folder.glob(pattern)) if pq.ParquetFile(path).metadata.num_rows)


def flip_config(folder: Path) -> None:
    """A statement with another config, under its right name."""
    path = next((folder / "evidence/statements").glob("*.json"))
    body = json.loads(path.read_text())
    body["predicate"]["buildDefinition"]["externalParameters"]["config"] = {"seed": 1}
    path.unlink()
    (path.parent / f"{independent_verifier.sha256(canonical(body))}.json").write_bytes(canonical(body))


FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda r: (r / "model/config.json").write_text("{}"), "provenance: model/config.json is not"),
    "a file": (lambda r: (r / "dataset/more.txt").write_text("x"), "provenance: dataset/more.txt has no origin"),
    "a text": (
        lambda r: change_rows(first(r, "dataset/kept/prose/*"), lambda rows: rows[0].update(text="x")),
        "documents: prose/part-0000",
    ),
    "a disposition": (
        lambda r: change_rows(first(r, "dataset/dispositions/sums/*"), lambda rows: rows.pop()), "documents: sums: 11",
    ),
    "a root": (
        lambda r: change_json(r / "dataset/merkle.json", lambda m: m["kept/prose"].update(root="00")),
        "merkle_roots: merkle.json: kept/prose",
    ),
    "a step": (
        lambda r: change_rows(first(r, "dataset/order/pretrain/*.parquet"), lambda rows: rows[0].update(id="prose/000")),
        "order: order/pretrain: step 1 reads prose/000",
    ),
    "a score": (
        lambda r: change_json(r / "dataset/evaluation/mid/scores.json", lambda s: s["accuracy_all"].update(value=1)
                              or s["accuracy"]["add"].update(value=1)),
        "scores: evaluation/mid/scores.json: task add",
    ),
    "a config": (flip_config, "does not follow from the config"),
    "a digest": (
        lambda r: change_json(r / "evidence/manifests/dedup.json", lambda m: m.update(digest="0" * 64)),
        "provenance: evidence/manifests/dedup.json",
    ),
    "a list in place of an object": (
        lambda r: change_json(r / "evidence/release.json", lambda b: b.update(nodes=[])),
        "provenance: a file is missing or malformed (AttributeError",
    ),
    "an input": (
        lambda r: (r / "dataset/summary.json").unlink(), "documents: a file is missing or malformed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forger_who_writes_the_checksums_anew_is_caught(release: Path, tmp_path: Path, forgery: str) -> None:
    change, line = FORGERIES[forgery]
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    change(copy)
    assert any(text.startswith("checksums: ") and text != "checksums: sound" for text in run(copy)[1])
    resum(copy)
    code, lines = run(copy)
    assert code == 1 and any(line in text for text in lines), lines
    assert "checksums: sound" in lines


def test_what_is_no_regular_file_is_named_and_not_read(release: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    (copy / "link").symlink_to(release / "site")
    (copy / "model.cache").mkdir()
    (copy / "model.cache/file").write_text("x")
    os.mkfifo(copy / "pipe")
    code, lines = run(copy)
    assert code == 1 and {
        "checksums: link is a link, or no regular file", "checksums: pipe is a link, or no regular file",
        "checksums: model.cache/file is in no checksum file",
    } <= set(lines)  # fmt: skip
