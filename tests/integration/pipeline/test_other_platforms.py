"""verify, trace, show and pull from the base installation as on macOS, with everything hidden that only Linux has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from release import tracing
from release.audit import show as page
from release.audit import verify as audit
from release.checks import check_runner
from release.hub.local.server import LOCAL_TOKEN, running
from release.opened_release import Release
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import at_length

LACKING = "/proc/self/status"


def elsewhere(home: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """The output of a command as on macOS; no program is in its PATH."""
    script = ROOT / "tests/fixtures/bare_platform.py"
    env = {
        "PYTHONPATH": str(ROOT),
        "ATOM_HOME": str(home),
        "HOME": str(home),
        "TMPDIR": str(home),  # no process with locks, such as a test beside this one, sweeps it
        "PATH": str(home / "none"),
        **environment,
    }
    command = [sys.executable, "-P", str(script), *arguments]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == code, f"{process.stdout}\n{process.stderr}"
    return process.stdout


def test_verify_gives_the_same_verdict_and_says_what_it_lacks(built: Path, tmp_path: Path) -> None:
    assert check_runner.missing_limits() == "", "this machine is the Linux that the other ones are compared with"
    expected = json.loads(json.dumps(audit.verify(built).to_json()))
    verdict = json.loads(elsewhere(tmp_path, "verify", str(built), "--json"))
    checks = {check["name"]: check for check in verdict["checks"]}
    limits = checks.pop("limits")
    assert verdict["ok"] and limits["ok"] is None and LACKING in limits["detail"]
    for check in expected["checks"]:
        there = checks.pop(check["name"])
        lacks_package = there["ok"] is None or any("pip install" in line for line in there["skipped"])
        assert there == check or lacks_package, there
    assert not checks


@at_length("release", 20)
def test_a_deep_verification_says_what_it_lacks(built: Path, tmp_path: Path) -> None:
    deep = elsewhere(tmp_path, "verify", "--deep", str(built))
    assert f"skipped reload_in_transformers: not checked, because loading a model within limits needs {LACKING}" in deep
    assert (
        "skipped weights: not checked, because it needs torch; run pip install '.[train]' in the checkout or in code/ of a release"
        in deep
    )
    assert "ok      order" in deep and "ok      documents" in deep and ": verified; it is not signed: " in deep


@at_length("release", 10)
def test_a_flipped_byte_is_reported_there_too(copy: Path, tmp_path: Path) -> None:
    path = copy / "model/config.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    text = elsewhere(tmp_path, "verify", str(copy), code=1)
    assert "BAD     checksums: evidence/SHA256SUMS: model/config.json is altered" in text


@pytest.mark.parametrize(
    "question",
    ["step", pytest.param("doc", marks=at_length("release", 10)), pytest.param("text", marks=at_length("release", 10))],
)
def test_trace_gives_the_same_answer(question: str, built: Path, tmp_path: Path) -> None:
    options, answer = {
        "step": (("--step", "2", "--phase", "pretrain"), lambda: tracing.trace_step(built, "pretrain", 2)),
        "doc": (("--doc", "prose/001"), lambda: tracing.trace_document(built, "prose/001")),
        "text": (("--text", "quick "), lambda: tracing.trace_text(built, "quick ")),
    }[question]
    text = elsewhere(tmp_path, "trace", str(built), *options, "--json")
    assert json.loads(text) == json.loads(json.dumps(answer().to_json()))


def test_show_gives_the_same_page(built: Path, tmp_path: Path) -> None:
    assert elsewhere(tmp_path, "show", str(built)).rstrip("\n") == page.text(page.facts_of(Release(built))).rstrip("\n")


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
        text = elsewhere(tmp_path, "verify", "local/kept-base", **hub)
        assert "model local/kept-base: verified" in text
        assert not list(tmp_path.glob("atom-scratch-*"))
