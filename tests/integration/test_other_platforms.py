"""verify, trace, show and pull from the base installation, with everything hidden that only Linux has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from release.checks import confine
from release.hub.local.server import LOCAL_TOKEN, running
from release.tree import inode, real_bytes
from tests.fixtures import ROOT, old_release_fixtures

LACKING = {
    "macos": "the module resource and /proc/self/status",
    "windows": "fork and the module resource and /proc/self/status",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained release with every phase."""
    return old_release_fixtures.unpack(tmp_path_factory.mktemp("kept"))


def elsewhere(platform: str, home: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """The output of a command on such a platform; no program is in its PATH."""
    script = ROOT / "tests/fixtures/bare_platform.py"
    env = {
        "PYTHONPATH": str(ROOT),
        "ATOM_HOME": str(home),
        "HOME": str(home),
        "PATH": str(home / "none"),
        **environment,
    }
    command = [sys.executable, "-P", str(script), platform, *arguments]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == code, f"{process.stdout}\n{process.stderr}"
    return process.stdout


def here(home: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ATOM_HOME": str(home)}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300).stdout


def test_verify_gives_the_same_verdict_and_says_what_it_lacks(release: Path, tmp_path: Path) -> None:
    assert confine.missing() == "", "this machine is the Linux that the other ones are compared with"
    expected = json.loads(here(tmp_path, "verify", str(release), "--json"))
    verdict = json.loads(elsewhere("windows", tmp_path, "verify", str(release), "--json"))
    checks = {check["name"]: check for check in verdict["checks"]}
    limits = checks.pop("limits")
    assert verdict["ok"] and limits["ok"] is None and LACKING["windows"] in limits["detail"]
    assert checks == {check["name"]: check for check in expected["checks"]}
    deep = elsewhere("macos", tmp_path, "verify", "--deep", str(release))
    assert (
        f"skipped reload_in_transformers: not asked, since loading a model within limits needs {LACKING['macos']}"
        in deep
    )
    assert "skipped weights: not asked, since it needs torch; install atom-release[train]" in deep
    assert "ok      order" in deep and "ok      documents" in deep and deep.endswith(": verified\n")


def test_a_flipped_byte_is_reported_there_too(release: Path, tmp_path: Path) -> None:
    path = release / "model/config.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"2", 1))
    try:
        text = elsewhere("windows", tmp_path, "verify", str(release), code=1)
    finally:
        path.write_bytes(content)
    assert "BAD     checksums: evidence/SHA256SUMS: model/config.json is altered" in text


@pytest.mark.parametrize(
    "question",
    [("--step", "2", "--phase", "rlvr"), ("--doc", "courtesy/000027"), ("--text", "def ")],
    ids=lambda q: q[0],
)
def test_trace_gives_the_same_answer(question: tuple[str, ...], release: Path, tmp_path: Path) -> None:
    answer = elsewhere("windows", tmp_path, "trace", str(release), *question, "--json")
    assert json.loads(answer) == json.loads(here(tmp_path, "trace", str(release), *question, "--json"))


def test_show_gives_the_same_page(release: Path, tmp_path: Path) -> None:
    assert elsewhere("windows", tmp_path, "show", str(release)) == here(tmp_path, "show", str(release))


def test_a_repository_is_pulled_and_verified(release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        upload = "import sys; from huggingface_hub import HfApi; api = HfApi(); name = 'local/kept-base'; "
        upload += "api.create_repo(name); api.upload_folder(repo_id=name, folder_path=sys.argv[1])"
        hub = {
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": LOCAL_TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", upload, str(release / "model-base")]
        subprocess.run(command, env={**os.environ, **hub}, check=True, capture_output=True, timeout=100)
        text = elsewhere("windows", tmp_path, "verify", "local/kept-base", **hub)
        assert "model local/kept-base: verified" in text
        assert not list(tmp_path.glob("atom-scratch-*"))


def test_files_without_inodes_are_told_apart() -> None:
    """As a listing on Windows has them."""

    def status(size: int, number: int) -> Any:
        return os.stat_result((0o100644, number, 0, 1, 0, 0, size, 0, 0, 0))

    assert real_bytes([status(5, 0), status(7, 0)]) == 12 and real_bytes([status(5, 3), status(5, 3)]) == 5
    assert inode(status(5, 0)) is None and inode(status(5, 3)) == (0, 3)
