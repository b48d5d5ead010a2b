"""What a forger may plant, with all checksums made anew: `verify` says so in a sentence, and runs none of it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import release_world as world
from test_release_verify import resum

from release import build as builder
from release.layout import ALL_SUMS, CANARY, GATES_STATED, ORIGINS, ROOTS, SUMS
from release.verify import verify


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(world.build_input(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("home"))


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


class Tell:
    """Unpickled, it leaves a file."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return open, (f"{self.where}", "w")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["model/pytorch_model.bin", "model/more.safetensors", "dataset/rl/x.txt", "evidence/a.pkl"]
)
def test_a_pickle_is_refused_and_not_opened(name: str, copy: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(pickle.dumps(Tell(told)))
    resum(copy)
    verdict = verify(copy, deep=True)
    found = {check.name: check for check in verdict.checks}
    assert not verdict.ok and found["formats"].wrong == [
        f"{name} is, or may be, a pickle, which runs code when it is loaded; a release holds none"
    ]
    assert found["reload_in_transformers"].ok is None and not told.exists()
    pickle.loads((copy / name).read_bytes())  # it would have told
    assert told.exists()


@pytest.mark.parametrize("length", [2**62, 10**10, 5, 0])
def test_a_header_of_weights_that_lies(length: int, copy: Path) -> None:
    path = copy / "model/model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    resum(copy)
    verdict = verify(copy, deep=True)
    wrong = [text for check in verdict.checks for text in check.wrong]
    assert not verdict.ok and all("\n" not in text or "cannot be checked" in text for text in wrong)
    assert any(check.name == "origins" and check.ok is False for check in verdict.checks)
    assert any(check.name == "cards" and check.ok is False for check in verdict.checks)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "model/../../outside"])
def test_paths_lead_nowhere_outside(path: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    rows = json.loads((copy / ORIGINS).read_text())
    rows[path] = {"artifact": "curate", "file": "summary.json"}
    world.write_json(copy / ORIGINS, rows)
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    folder = path.split("/")[0]
    assert checks["origins"].ok is False or not (copy / folder).exists()
    (copy / SUMS).write_text(f"{'0' * 64}  ../outside\n" + (copy / SUMS).read_text())
    found = next(check for check in verify(copy).checks if check.name == f"checksums: {SUMS}")
    assert found.ok is False and f"../outside is missing (listed in {SUMS})" in found.wrong


def test_texts_that_grow_when_they_are_read(copy: Path) -> None:
    card = copy / "model/README.md"
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(12))
    card.write_text(f"---\n{bomb}\n---\n" + card.read_text().split("---", 2)[2])
    (copy / "evidence/gates.json").write_text("[" * 100_000 + "]" * 100_000)
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["cards"].ok is False and checks["gates"].ok is False and "RecursionError" in checks["gates"].wrong[0]


def test_a_release_of_an_older_version_lacks_what_there_was_not_yet(copy: Path) -> None:
    gone = [f"dataset/{ROOTS}", "dataset/croissant.json", f"dataset/{CANARY}", GATES_STATED, "model/goldens.json"]
    rows = json.loads((copy / ORIGINS).read_text())
    for path in gone:
        (copy / path).unlink()
        rows.pop(path, None)
    world.write_json(copy / ORIGINS, rows)
    resum(copy)
    checks = {check.name: check for check in verify(copy, deep=True).checks}
    absent = {name for name, check in checks.items() if check.ok is None}
    assert absent == {"signatures", "merkle_roots", "croissant", "attestations"}
    assert "this release was made before there was one" in checks["merkle_roots"].detail
    assert not [name for name, check in checks.items() if check.ok is False], checks


def test_half_a_download_is_told(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(release / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/model.safetensors.incomplete").write_bytes(b"x")
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes()[:100])
    wrong = [text for check in verify(folder).checks for text in check.wrong]
    assert f"model.safetensors is missing (listed in {SUMS})" in wrong
    assert f"README.md is altered: it is not the file that {SUMS} lists" in wrong
    assert not (release / ALL_SUMS).is_symlink()
