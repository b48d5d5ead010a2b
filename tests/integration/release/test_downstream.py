"""A release of atom-smoke with texts by reference: verified, rebuilt, replayed; its chat data by TRL, and training that
begins with its model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.store import sha256_file
from tests.fixtures import ROOT
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.run_fixtures import at_length, atom

pytestmark = [pytest.mark.numeric, at_length("release", 300)]
BY_REFERENCE = ["docstrings", "code"]


@pytest.fixture(scope="module")
def home(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("downstream") / "home"
    shutil.copytree(smoke_home, home)
    body = yaml.safe_load(SMOKE.read_text())
    body["release"]["by_reference"] = BY_REFERENCE
    (home.parent / "smoke.yaml").write_text(yaml.safe_dump(body))
    atom(home, "build", str(home.parent / "smoke.yaml"))
    return home


@pytest.fixture(scope="module")
def release(home: Path) -> Path:
    return home / "releases/atom-smoke-0.1.0"


def test_it_is_verified_and_rebuilt(home: Path, release: Path) -> None:
    verdict = json.loads(atom(home, "verify", str(release), "--deep", "--json").stdout)
    (row,) = [check for check in verdict["checks"] if check["name"] == "references"]
    assert verdict["ok"] and all(
        any(f"documents of {name} are" in text for text in row["skipped"]) for name in BY_REFERENCE
    )
    second = [sys.executable, str(release / "evidence/independent_verifier.py"), str(release)]
    assert subprocess.run(second, check=False).returncode == 0
    refused = atom(home, "replay", str(release), "pretrain", code=2).stderr
    assert "are by reference; get them by `atom rebuild-data" in refused
    rebuilt = json.loads(atom(home, "rebuild-data", str(release), "--json").stdout)
    assert [(row["source"], row["equal"]) for row in rebuilt["sources"]] == [
        (name, row["files"]) for name, row in zip(sorted(BY_REFERENCE), rebuilt["sources"], strict=True)
    ]
    assert ": bitwise" in atom(home, "replay", str(release), "pretrain").stdout


def test_its_conversations_fine_tune_its_model(release: Path, tmp_path: Path) -> None:
    arguments = [str(release / "model"), str(release / "dataset"), "courtesies-messages", str(tmp_path), "--steps", "3"]
    command = [sys.executable, str(ROOT / "examples/lora.py"), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    options = yaml.safe_load((release / "model/serve.yaml").read_text())
    assert options["model"] == "local/atom-smoke" and "openai" in (release / "model/README.md").read_text()


def test_training_goes_on_from_its_model(home: Path, release: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = yaml.safe_load(SMOKE.read_text())
    digest = f"sha256:{sha256_file(release / 'model/SHA256SUMS')}"
    body["start_from"] = {
        "repo": "local/atom-smoke", "folder": str(release / "model"), "digest": digest,
        "license": "Apache-2.0",
    }  # fmt: skip
    body["name"] = "further"
    recipe = tmp_path / "further.yaml"
    recipe.write_text(yaml.safe_dump(body))
    atom(home, "run", str(recipe), "--until", "export-base", timeout=1800)
    (base,) = (home / "artifacts").glob("import-*/base.json")
    assert json.loads(base.read_text())["repo"] == "local/atom-smoke"
    plan = json.loads(atom(home, "plan", str(recipe), "--json").stdout)
    keys = {stage["name"]: stage["key"] for stage in plan["stages"]}
    log = [
        json.loads(text) for text in (home / "artifacts" / keys["pretrain"] / "training.jsonl").read_text().splitlines()
    ]
    assert log[0]["step"] == 0 and log[0]["heldout_loss"] < 5, "an untrained model has 6.1"
