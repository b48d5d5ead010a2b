"""What a forger may plant, with all checksums made anew: `verify` says so in a sentence, and runs none of it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import release_world as world
from test_release_verify import resum

from pipeline.errors import AtomError
from release import gates
from release.layout import CANARY, GATES_STATED, ORIGINS, ROOTS, SUMS
from release.verify import verify


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


@pytest.mark.parametrize("length", [2**62, 5])
def test_a_header_of_weights_that_lies(length: int, copy: Path) -> None:
    path = copy / "model/model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    resum(copy)
    verdict = verify(copy, deep=True)
    wrong = [text for check in verdict.checks for text in check.wrong]
    assert not verdict.ok and all("\n" not in text for text in wrong)
    said = f"says that its header has {length} bytes, which no model's has" if length > 5 else "its header is no JSON"
    assert [check.name for check in verdict.checks if check.ok is False] == ["formats"]
    assert all("model/model.safetensors" in text and said in text for text in wrong), wrong


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "model/../../outside"])
def test_paths_lead_nowhere_outside(path: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    rows = json.loads((copy / ORIGINS).read_text())
    rows[path] = {"artifact": "curate", "file": "summary.json"}
    world.write_json(copy / ORIGINS, rows)
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["origins"].ok is False
    (copy / SUMS).write_text(f"{'0' * 64}  ../outside\n" + (copy / SUMS).read_text())
    found = next(check for check in verify(copy).checks if check.name == f"checksums: {SUMS}")
    assert found.ok is False and f"../outside is missing (listed in {SUMS})" in found.wrong


def test_texts_that_grow_when_they_are_read(copy: Path) -> None:
    card = copy / "model/README.md"
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(12))
    card.write_text(f"---\n{bomb}\n---\n" + card.read_text().split("---", 2)[2])
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["cards"].ok is False
    (copy / "evidence/gates.json").write_text("[" * 100_000 + "]" * 100_000)
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["formats"].wrong == [
        "evidence/gates.json: gates.json is no JSON that can be read: it is nested too deeply"
    ]


def test_a_release_of_an_older_version_lacks_what_there_was_not_yet(copy: Path) -> None:
    path = copy / "evidence/release.json"
    about = json.loads(path.read_text())
    world.write_json(path, {name: value for name, value in about.items() if name != "card_schema"} | {"format": 1})
    for card in copy.rglob("README.md"):  # which stated no versions then
        card.write_text(re.sub(r"^atom_.*\n", "", card.read_text(), flags=re.MULTILINE))
    gone = [f"dataset/{ROOTS}", "dataset/croissant.json", f"dataset/{CANARY}", GATES_STATED, "model/goldens.json"]
    rows = json.loads((copy / ORIGINS).read_text())
    for path in gone:
        (copy / path).unlink()
        rows.pop(path, None)
    world.write_json(copy / ORIGINS, rows)
    resum(copy)
    checks = {check.name: check for check in verify(copy, deep=True).checks}
    absent = {name for name, check in checks.items() if check.ok is None}
    assert absent == {"signatures", "merkle_roots", "croissant", "attestations", "cards"}
    assert "this release was made before there was one" in checks["merkle_roots"].detail
    assert not [name for name, check in checks.items() if check.ok is False], checks


def test_code_of_a_models_own_is_refused_and_not_run(copy: Path, tmp_path: Path, monkeypatch) -> None:
    told, config = tmp_path / "told", json.loads((copy / "model/config.json").read_text())
    own = {"AutoConfig": "m.Own", "AutoModelForCausalLM": "m.Model"}
    world.write_json(copy / "model/config.json", {**config, "model_type": "own", "auto_map": own})
    (copy / "model/m.py").write_text(f"open({str(told)!r}, 'w')\nclass Own: ...\nclass Model: ...\n")
    resum(copy)
    wrong = next(check.wrong for check in verify(copy, deep=True).checks if check.name == "formats")
    assert len(wrong) == 2 and "auto_map" in wrong[0] and "model/m.py is code" in wrong[1]
    read, write = os.pipe()  # somebody who says yes to everything
    os.write(write, b"y\n" * 100)
    os.dup2(read, 0)
    (found,) = gates.run_reload([copy / "model"])
    assert found["problems"] and not told.exists()


def test_goldens_are_compared_and_missed(copy: Path) -> None:
    path = copy / "model/goldens.json"
    body = json.loads(path.read_text())
    for value in (float("nan"), body["rows"][0]["logits"][0] + 0.01):
        body["rows"][0]["logits"][0] = value
        path.write_text(json.dumps(body))
        resum(copy)
        found = next(check for check in verify(copy, deep=True).checks if check.name == "reload_in_transformers")
        assert found.ok is False and "goldens.json: logits after 'def main(): 2+2' differ" in found.wrong[0]
    path.unlink()
    rows = json.loads((copy / ORIGINS).read_text())
    rows.pop("model/goldens.json")
    world.write_json(copy / ORIGINS, rows)
    resum(copy)
    found = next(check for check in verify(copy, deep=True).checks if check.name == "reload_in_transformers")
    assert found.wrong == ["goldens.json is missing"]


def test_a_release_of_a_later_format_is_refused(copy: Path) -> None:
    path = copy / "evidence/release.json"
    world.write_json(path, {**json.loads(path.read_text()), "format": 99})
    with pytest.raises(AtomError, match="has the format 99, and this atom knows 2 at most"):
        verify(copy)


def test_half_a_download_is_told(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(built / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/model.safetensors.incomplete").write_bytes(b"x")
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes()[:100])
    wrong = [text for check in verify(folder).checks for text in check.wrong]
    assert f"model.safetensors is missing (listed in {SUMS})" in wrong
    assert f"README.md is altered: it is not the file that {SUMS} lists" in wrong


@pytest.mark.parametrize("place", ["model", "model-base", "checkpoints", "checkpoints/pretrain-step-2", "dataset"])
def test_code_in_a_repository_alone_is_refused_where_a_release_keeps_its_source(place: str, copy: Path) -> None:
    """In `code/`, and beside an `evidence/`, as in the repository that holds both."""
    folder = copy / place
    before = verify(folder).kind
    for path in ("code/m.py", "code/release/build.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x = 1\n")
    world.write_json(folder / ORIGINS, {})
    resum(copy)
    verdict = verify(folder)
    found = {check.name: check for check in verdict.checks}
    assert verdict.kind == before and [text.split(" is ")[0] for text in found["formats"].wrong] == [
        "code/m.py",
        "code/release/build.py",
    ]
