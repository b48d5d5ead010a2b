"""What a forger may plant, with all checksums made anew: `verify` says so in a sentence, and runs none of it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CheckFailed
from release.audit.replay.source import Source
from release.checks.loading import load_models
from release.checks.scores import scores
from release.layout import ALL_SUMS, ORIGINS, SUMS
from release.opened_release import Release
from release.repositories import read_sums
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.conversation_fixtures import CONVERSATIONS
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import SOAK


class LeavesFile:
    """Unpickled, it leaves a file."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return open, (f"{self.where}", "w")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["model/pytorch_model.bin", "model/more.safetensors", "dataset/rl/x.txt", "evidence/a.pkl"]
)
def test_a_pickle_is_refused_and_not_opened(name: str, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "opened"
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(pickle.dumps(LeavesFile(marker)))
    resum(copy)
    verdict = verify(copy, deep=True)
    checks = {check.name: check for check in verdict.checks}
    assert not verdict.ok and checks["formats"].wrong == [
        f"{name} is, or may be, a pickle, which runs code when it is loaded; a release holds none"
    ]
    assert checks["reload_in_transformers"].ok is None and not marker.exists()
    pickle.loads((copy / name).read_bytes())  # it would have left the file
    assert marker.exists()


@pytest.mark.parametrize("length", [2**62, 5])
def test_a_header_of_weights_that_lies(length: int, copy: Path) -> None:
    path = copy / "model/model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    resum(copy)
    verdict = verify(copy, deep=True)
    wrong = [text for check in verdict.checks for text in check.wrong]
    assert not verdict.ok and all("\n" not in text for text in wrong)
    problem = (
        f"says that its header has {length} bytes, which no model's has" if length > 5 else "its header is no JSON"
    )
    assert [check.name for check in verdict.checks if check.ok is False] == ["formats"]
    assert all("model/model.safetensors" in text and problem in text for text in wrong), wrong


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "model/../../outside"])
def test_paths_lead_nowhere_outside(path: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    rows = json.loads((copy / ORIGINS).read_text())
    rows[path] = {"artifact": "dedup", "file": "summary.json"}
    release_fixtures.write_json(copy / ORIGINS, rows)
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["origins"].ok is False
    (copy / SUMS).write_text(f"{'0' * 64}  ../outside\n" + (copy / SUMS).read_text())
    result = next(check for check in verify(copy).checks if check.name == f"checksums: {SUMS}")
    assert result.wrong == [f"{SUMS} is altered: line 1 names ../outside, which leads elsewhere"]


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


def test_code_of_a_models_own_is_refused_and_not_run(copy: Path, tmp_path: Path, monkeypatch) -> None:
    marker, config = tmp_path / "opened", json.loads((copy / "model/config.json").read_text())
    auto_map = {"AutoConfig": "m.Own", "AutoModelForCausalLM": "m.Model"}
    release_fixtures.write_json(copy / "model/config.json", {**config, "model_type": "own", "auto_map": auto_map})
    (copy / "model/m.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: ...\nclass Model: ...\n")
    resum(copy)
    wrong = next(check.wrong for check in verify(copy, deep=True).checks if check.name == "formats")
    assert len(wrong) == 2 and "auto_map" in wrong[0] and "model/m.py is code" in wrong[1]
    read, write = os.pipe()  # somebody who says yes to everything
    os.write(write, b"y\n" * 100)
    os.dup2(read, 0)
    (report,) = load_models([copy / "model"])
    assert report.problems and not marker.exists()


def test_goldens_are_compared_and_missed(copy: Path) -> None:
    path = copy / "model/goldens.json"
    body = json.loads(path.read_text())
    other = body["rows"][0]["logits"][0] + 0.01
    for value in (float("nan"), other) if SOAK else (other,):
        body["rows"][0]["logits"][0] = value
        path.write_text(json.dumps(body, indent=1) + "\n")
        resum(copy)
        result = next(
            check for check in verify(copy / "model", deep=True).checks if check.name == "reload_in_transformers"
        )
        assert result.ok is False and "goldens.json: logits after 'def main(): 2+2' differ" in result.wrong[0]
    path.unlink()
    rows = json.loads((copy / ORIGINS).read_text())
    rows.pop("model/goldens.json")
    release_fixtures.write_json(copy / ORIGINS, rows)
    resum(copy)
    result = next(check for check in verify(copy, deep=True).checks if check.name == "reload_in_transformers")
    assert result.wrong == ["goldens.json is missing"]


def test_recorded_conversations_are_rendered_again(copy: Path) -> None:
    """By Jinja and tokenizers; a release that has recorded none says so."""
    path = copy / "model/goldens.json"
    body = json.loads(path.read_text())

    def verdict(conversations: list[dict[str, Any]] | None) -> Any:
        recorded = {} if conversations is None else {"conversations": conversations}
        kept = {name: body[name] for name in ("messages", "rows")}
        path.write_text(json.dumps(kept | recorded, indent=1) + "\n")
        resum(copy)
        (result,) = (check for check in verify(copy / "model").checks if check.name == "chat_templates")
        return result

    rows = body["conversations"]
    assert len(rows) == len(CONVERSATIONS) and verdict(rows).ok
    assert verdict([{**rows[0], "text": "x"}, *rows[1:]]).wrong == [
        "model/chat_template.jinja renders conversation 1 of goldens.json otherwise",
        "model/training_chat_template.jinja renders conversation 1 of goldens.json otherwise",
        "model: tokenizer.json encodes conversation 1 of goldens.json otherwise",
    ]
    assert verdict([*rows[:4], {**rows[4], "ids": rows[3]["ids"]}]).wrong == [
        "model: tokenizer.json encodes conversation 5 of goldens.json otherwise"
    ]
    assert verdict(None).wrong == ["model/goldens.json records no conversations"]


LATER, NEVER = (
    "and this atom reads 1; get a newer atom",
    "which was never published; get the release again from its maker",
)
NO_NUMBERS = "evidence/release.json does not state its format and card schema; get the release again"
VERSIONS: dict[str, tuple[dict[str, object], str]] = {
    "a later format": ({"format": 99}, f"states format 99, {LATER}"),
    "format 0": ({"format": 0}, f"states format 0, {NEVER}"),
    "a negative format": ({"format": -7}, f"states format -7, {NEVER}"),
    "a huge format": ({"format": 10**30}, f"states format {10**30}, {LATER}"),
    "a format that is no number": ({"format": "four"}, NO_NUMBERS),
    "a format of no digits": ({"format": True}, NO_NUMBERS),
    "a later card schema": ({"card_schema": 9}, f"states card schema 9, {LATER}"),
    "card schema 0": ({"card_schema": 0}, f"states card schema 0, {NEVER}"),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_an_unknown_version_is_one_bad_line(name: str, copy: Path) -> None:
    stated, expected = VERSIONS[name]
    path = copy / "evidence/release.json"
    release_fixtures.write_json(path, {**json.loads(path.read_text()), **stated})
    for card in copy.rglob("README.md"):
        text = card.read_text()
        for field, number in stated.items():
            text = re.sub(rf"^(atom_(release_)?{field}): .*", rf"\1: {number}", text, flags=re.MULTILINE)
        card.write_text(text)
    verdict = verify(copy)
    assert [text for check in verdict.checks for text in check.wrong] == [expected]
    assert not verdict.ok and json.loads(json.dumps(verdict.to_json()))["ok"] is False
    if stated.keys() == {"card_schema"}:  # on one repository alone, too
        assert [check.detail for check in verify(copy / "model").checks] == [expected]


@pytest.mark.parametrize("place", ["dataset/evaluation/mid/README.md", "dataset/evaluation/mid/evidence/release.json"])
def test_versions_stand_at_the_root_alone(place: str, copy: Path) -> None:
    """Those of a folder within would decide how the files beside it are compared."""
    path = copy / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        path.write_text("---\natom_release_format: 9\natom_card_schema: 9\n---\n")
    else:
        release_fixtures.write_json(path, {"format": 9, "card_schema": 9})
    rows = json.loads((copy / ORIGINS).read_text())
    release_fixtures.write_json(copy / ORIGINS, {**rows, place: {"generated": "x"}})
    resum(copy)
    checks = {check.name: check for check in verify(copy).checks}
    assert checks["versions"].ok is False and checks["versions"].wrong[0].startswith(f"{place} states ")
    checks = {check.name: check for check in verify(copy / "dataset").checks}
    assert checks["versions"].ok is False and checks["versions"].wrong[0].startswith(place.removeprefix("dataset/"))


def test_scores_lack_no_figure(copy: Path) -> None:
    path = copy / "dataset/evaluation/mid/scores.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in stated.items() if key != sorted(stated)[0]}))
    assert scores(Release(copy / "dataset", "dataset")).problems == [
        "evaluation/mid/scores.json is not what its tables give"
    ]


LINES = {
    "a path that leads out": "code/release/../../../x", "an absolute path": "/tmp/x", "a dot": "code/./x", "no name": "code//x",
    "a folder": "code/x/", "an escape": "code/\x1b[2J", "a name that turns text": "code/\u202ex", "a long name": "x" * 256,
    "a long path": "x/" * 600 + "x", "a carriage return": "code/x\r",
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_checksum_file_names_files_of_its_folder_only(name: str, copy: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    for place in (SUMS, ALL_SUMS):
        lines = [line for line in (copy / place).read_text().splitlines() if not line.endswith(ALL_SUMS)]
        lines.append(f"{digest}  {LINES[name]}")
        lines.sort(key=lambda line: line[66:])
        (copy / place).write_bytes(("\n".join(lines) + "\n").encode())
        with pytest.raises(CheckFailed, match="which leads elsewhere") as raised:
            read_sums(copy / place, place)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
    with pytest.raises(CheckFailed):
        Source(copy)


def test_code_behind_a_link_is_not_read_for_a_replay(copy: Path) -> None:
    (copy / "code/release").rename(copy / "code/real")
    (copy / "code/release").symlink_to("real")
    with pytest.raises(CheckFailed, match="is a link, or is reached through one"):
        Source(copy).file("code/release/assembly/build_release.py")


def test_half_a_download_is_reported(built: Path, tmp_path: Path) -> None:
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
    for path in ("code/m.py", "code/release/assembly/build_release.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x = 1\n")
    release_fixtures.write_json(folder / ORIGINS, {})
    resum(copy)
    verdict = verify(folder)
    checks = {check.name: check for check in verdict.checks}
    assert verdict.kind == before and [text.split(" is ")[0] for text in checks["formats"].wrong] == [
        "code/m.py",
        "code/release/assembly/build_release.py",
    ]
