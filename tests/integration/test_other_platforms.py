"""verify, trace, show and pull from the base installation, with everything hidden that only Linux has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from release.audit import show as page
from release.audit import tracing
from release.audit import verify as audit
from release.checks import confine
from release.hub.local.server import LOCAL_TOKEN, running
from release.tree import inode, real_bytes
from tests.fixtures import ROOT, old_release_fixtures
from tests.fixtures.run_fixtures import at_length

LACKING = {
    "macos": "the module resource and /proc/self/status",
    "windows": "fork and the module resource and /proc/self/status",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of an earlier format with every phase, which is traced and shown, and not verified."""
    return old_release_fixtures.unpack(tmp_path_factory.mktemp("kept"))


def elsewhere(platform: str, home: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """The output of a command on such a platform; no program is in its PATH."""
    script = ROOT / "tests/fixtures/bare_platform.py"
    env = {
        "PYTHONPATH": str(ROOT),
        "ATOM_HOME": str(home),
        "HOME": str(home),
        "TMPDIR": str(home),  # no process with locks, such as a test beside this one, sweeps it
        "PATH": str(home / "none"),
        **environment,
    }
    command = [sys.executable, "-P", str(script), platform, *arguments]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == code, f"{process.stdout}\n{process.stderr}"
    return process.stdout


def test_verify_gives_the_same_verdict_and_says_what_it_lacks(built: Path, tmp_path: Path) -> None:
    assert confine.missing() == "", "this machine is the Linux that the other ones are compared with"
    expected = json.loads(json.dumps(audit.verify(built).to_json()))
    verdict = json.loads(elsewhere("windows", tmp_path, "verify", str(built), "--json"))
    checks = {check["name"]: check for check in verdict["checks"]}
    limits = checks.pop("limits")
    assert verdict["ok"] and limits["ok"] is None and LACKING["windows"] in limits["detail"]
    for check in expected["checks"]:
        there = checks.pop(check["name"])
        lacks_package = there["ok"] is None or any("pip install" in line for line in there["skipped"])
        assert there == check or lacks_package, there
    assert not checks


@at_length("release", 20)
def test_a_deep_verification_says_what_it_lacks(built: Path, tmp_path: Path) -> None:
    deep = elsewhere("macos", tmp_path, "verify", "--deep", str(built))
    assert (
        f"skipped reload_in_transformers: not checked, because loading a model within limits needs {LACKING['macos']}"
        in deep
    )
    assert (
        "skipped weights: not checked, because it needs torch; run pip install '.[train]' in the checkout or in code/ of a release"
        in deep
    )
    assert "ok      order" in deep and "ok      documents" in deep and ": verified; it is not signed: " in deep


@at_length("release", 10)
def test_a_flipped_byte_is_reported_there_too(copy: Path, tmp_path: Path) -> None:
    path = copy / "model/config.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    text = elsewhere("windows", tmp_path, "verify", str(copy), code=1)
    assert "BAD     checksums: evidence/SHA256SUMS: model/config.json is altered" in text


@pytest.mark.parametrize(
    "question",
    ["step", pytest.param("doc", marks=at_length("release", 10)), pytest.param("text", marks=at_length("release", 10))],
)
def test_trace_gives_the_same_answer(question: str, release: Path, tmp_path: Path) -> None:
    options, answer = {
        "step": (("--step", "2", "--phase", "rlvr"), lambda: tracing.trace_step(release, "rlvr", 2)),
        "doc": (("--doc", "courtesy/000027"), lambda: tracing.trace_document(release, "courtesy/000027")),
        "text": (("--text", "def "), lambda: tracing.trace_text(release, "def ", tmp_path / "trace")),
    }[question]
    text = elsewhere("windows", tmp_path, "trace", str(release), *options, "--json")
    assert json.loads(text) == json.loads(json.dumps(answer().to_json()))


def test_show_gives_the_same_page(release: Path, tmp_path: Path) -> None:
    assert elsewhere("windows", tmp_path, "show", str(release)).rstrip("\n") == page.text(
        page.facts_of(release)
    ).rstrip("\n")


def test_a_repository_is_pulled_and_verified(built: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        upload = "import sys; from huggingface_hub import HfApi; api = HfApi(); name = 'local/kept-base'; "
        upload += "api.create_repo(name); api.upload_folder(repo_id=name, folder_path=sys.argv[1])"
        hub = {
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": LOCAL_TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", upload, str(built / "model-base")]
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
