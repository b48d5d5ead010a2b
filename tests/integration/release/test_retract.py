"""Retraction: documents leave a release, its folder and a real local Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.store import sha256_file
from release.facts.tombstones import read_tombstones
from release.hub.local.server import LOCAL_TOKEN, running
from release.hub.local.store import HubStore
from release.layout import RETRACTED
from release.retraction.retract import _trained_folders
from release.retraction.rewrite import Reached
from tests.fixtures import ROOT
from tests.fixtures.opt_out_fixtures import hashed, write_deny_list
from tests.fixtures.release_fixtures import corpus
from tests.fixtures.run_fixtures import at_length, atom
from tests.fixtures.signing_fixtures import write_key

TEXTS = {source: rows[3]["text"] for source, rows in corpus().items()}
"""The texts that go: document 3 of prose by its URL, and that of sums by its id."""
ENTRIES = ({"request": "r-1", "url": "https://example.org/prose/3"}, {"request": "r-2", "id": "sums/003"})


@pytest.fixture
def release(earlier_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(earlier_release, tmp_path / "tiny-0.1.0"))


@pytest.fixture
def deny_list(tmp_path: Path) -> Path:
    write_deny_list(tmp_path / "deny.jsonl", *ENTRIES)
    return tmp_path / "deny.jsonl"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a local Hub below `tmp_path/hub`."""
    with running(tmp_path / "hub") as endpoint:
        yield {"HF_ENDPOINT": endpoint, "HF_TOKEN": LOCAL_TOKEN, "HF_HOME": str(tmp_path / "hf")}


def repository(tmp_path: Path, kind: str, name: str) -> Any:
    """The file of a repository, in which each commit has its changes alone."""
    return json.loads((tmp_path / f"hub/repos/{kind}/local__{name}.json").read_text())


def state(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def ids(path: Path) -> set[str]:
    return {row["id"] for row in pq.read_table(path).to_pylist()}


@at_length("release", 45)
def test_documents_leave_the_folder_and_the_hub(
    release: Path, deny_list: Path, tmp_path: Path, hub: dict[str, str]
) -> None:
    key = write_key(tmp_path / "key.pem")
    atom(tmp_path, "sign", str(release), "--key", str(key))
    atom(tmp_path, "publish", str(release), "--to", "local", "--public", **hub)
    old_copy = Path(shutil.copytree(release / "dataset", tmp_path / "old"))
    old_release = Path(shutil.copytree(release, tmp_path / "old-release"))
    arguments = ["retract", str(release), "--documents", str(deny_list)]
    before = state(release), state(tmp_path / "hub/repos")

    refused = atom(tmp_path, *arguments, code=2, **hub)
    assert "is signed, and so must be its tombstone; give --key PEM" in refused.stderr
    signed = [*arguments, "--key", str(key)]
    preview = atom(tmp_path, *signed, "--dry-run", **hub).stdout
    assert "2 documents of tiny 0.1.0 would be retracted" in preview and "prose/003 (url)" in preview
    assert "local/tiny-data@main would be rewritten" in preview
    assert "local/tiny: trained on them, and stays; --models takes it back" in preview
    assert (state(release), state(tmp_path / "hub/repos")) == before

    killed = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *signed], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **hub, "ATOM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert killed.returncode == 9, killed.stderr
    assert sha256_file(old_copy / "kept/prose/part-00000.parquet") in os.listdir(tmp_path / "hub/blobs"), "not finished"
    done = atom(tmp_path, *signed, **hub).stdout
    assert "local/tiny-data@main is rewritten" in done and "LFS objects are deleted" in done
    assert atom(tmp_path, *signed, **hub).stdout.count("LFS objects are deleted") == 0, "nothing is left to do"

    for source in TEXTS:
        assert f"{source}/003" not in ids(release / f"dataset/kept/{source}/part-00000.parquet")
        assert sha256_file(old_copy / f"kept/{source}/part-00000.parquet") not in os.listdir(tmp_path / "hub/blobs")
    fates = {
        row["id"]: row for row in pq.read_table(release / "dataset/dispositions/prose/part-00000.parquet").to_pylist()
    }
    assert (fates["prose/003"]["rule"], fates["prose/003"]["match"]) == ("opt_out", f"url {hashed('r-1')}")
    assert fates["prose/002"]["disposition"] == "kept"
    for kind, name in (("dataset", "tiny-data"), ("dataset", "tiny-evidence"), ("model", "tiny")):
        stored = repository(tmp_path, kind, name)
        assert len(stored["commits"]) == 1 and stored["tags"]["v0.1.0"] == stored["branches"]["main"]
    weights = sha256_file(release / "model/model.safetensors")
    assert weights == sha256_file(old_release / "model/model.safetensors"), "no model goes without --models"
    assert weights in os.listdir(tmp_path / "hub/blobs")
    assert "Retracted in part" in (release / "dataset/README.md").read_text()
    assert "Trained on retracted data" in (release / "model/README.md").read_text()
    [tombstone] = read_tombstones(release / "dataset")
    assert [document.id for document in tombstone.documents] == ["prose/003", "sums/003"]
    assert not any(word in (release / RETRACTED).read_text() for word in ("r-1", "example.org", *TEXTS.values()))

    for subject in (str(release), "local/tiny-data", "local/tiny-evidence", "local/tiny"):
        verdict = atom(tmp_path, "verify", subject, code=3, **hub).stdout
        assert "retracted: 2 documents of tiny 0.1.0 taken back on request" in verdict and "BAD" not in verdict
    (release / RETRACTED).write_text((release / RETRACTED).read_text().replace("prose/003", "prose/004"))
    assert "BAD" in atom(tmp_path, "verify", str(release), code=1).stdout


INTERRUPTED = """
import os, sys
from release.retraction import hub
original, calls = hub._squash, []
def squash(destination):
    calls.append(destination)
    if len(calls) == 2:
        os._exit(9)
    original(destination)
hub._squash = squash
from pipeline.cli.__main__ import main
sys.argv = ["atom", *sys.argv[1:]]
main()
"""


@at_length("release", 21)
def test_models_go_with_the_flag_alone(release: Path, deny_list: Path, tmp_path: Path, hub: dict[str, str]) -> None:
    weights = sha256_file(release / "model/model.safetensors")
    atom(tmp_path, "publish", str(release), "--to", "local", "--public", **hub)
    answer = json.loads(
        atom(tmp_path, "retract", str(release), "--documents", str(deny_list), "--models", "--json", **hub).stdout
    )
    removed = answer["tombstone"]["removed"]
    assert removed == [
        "local/tiny-base", "local/tiny", *(
            f"local/tiny-checkpoints@{name}" for name in ("midtrain-step-0", "midtrain-step-2", "pretrain-step-2")
        ),
    ]  # fmt: skip
    assert sorted(path.name for path in (release / "model").iterdir()) == [
        "LICENSE",
        "README.md",
        "SHA256SUMS",
        RETRACTED,
    ]
    assert weights not in os.listdir(tmp_path / "hub/blobs")
    stored = HubStore(tmp_path / "hub").load("model", "local/tiny-checkpoints")
    assert stored is not None
    files = {branch: set(stored.commits[commit].files) for branch, commit in stored.branches.items()}
    assert not any(name.endswith(".safetensors") for name in files["pretrain-step-2"])
    assert any(name.endswith(".safetensors") for name in files["pretrain-step-0"]), "it was not trained on them"
    for subject in ("local/tiny", "local/tiny-checkpoints@pretrain-step-2", str(release)):
        assert "retracted: 2 documents" in atom(tmp_path, "verify", subject, code=3, **hub).stdout


@pytest.mark.parametrize("moment", ["between the renames", "before the old one is deleted"])
def test_a_replacement_that_is_killed_is_ended_by_the_same_command(release: Path, tmp_path: Path, moment: str) -> None:
    old, draft = (tmp_path / f".{release.name}.{state}" for state in ("retracted", "retracting"))
    arguments = ["retract", str(release), "--local", "--documents", "sums/003", "--request", "a"]
    if moment == "between the renames":
        shutil.copytree(release, draft)
        os.rename(release, old)
    else:
        shutil.copytree(release, tmp_path / "before")
        atom(tmp_path, *arguments)
        os.rename(tmp_path / "before", old)
    atom(tmp_path, *arguments)
    assert not old.exists() and not draft.exists()
    assert "sums/003" not in ids(release / "dataset/kept/sums/part-00000.parquet")


def test_what_is_refused_and_in_which_words(release: Path, tmp_path: Path) -> None:
    before = state(release)

    def refused(*arguments: str) -> str:
        return atom(tmp_path, "retract", str(release), "--local", *arguments, code=2).stderr

    assert "there is no deny-list sums/003; if that is the id of a document, give --request" in refused(
        "--documents", "sums/003"
    )
    assert "holds none of these documents" in refused("--documents", "sums/999", "--request", "a")
    assert "date is no day" in refused("--documents", "sums/003", "--request", "a", "--date", "today")
    assert state(release) == before
    done = atom(tmp_path, "retract", str(release), "--local", "--documents", "sums/003", "--request", "a").stdout
    assert "1 document of tiny 0.1.0 retracted" in done
    assert "sums/003" not in ids(release / "dataset/kept/sums/part-00000.parquet")
    again = atom(tmp_path, "retract", str(release), "--local", "--documents", "prose/003", "--request", "b").stdout
    assert "1 document of" in again and len(read_tombstones(release)) == 2
    assert "2 documents" not in atom(tmp_path, "verify", str(release), code=3).stdout


def test_variants_go_where_the_final_model_goes(release: Path) -> None:
    (release / "variant-q8").mkdir()
    assert "variant-q8" in _trained_folders(release, Reached(models={"mid"}))
    assert "variant-q8" not in _trained_folders(release, Reached(models={"base"}))
