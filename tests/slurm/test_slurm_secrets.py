"""On a real Slurm cluster: tokens of the login profile, of whoever submits, and of a job's own setup reach no stage."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.launch import cluster_profile, slurm
from tests.fixtures import slurm_fixtures, verdict_fixtures
from tests.fixtures.secret_fixtures import PLANTED, SECRETS

pytestmark = slurm_fixtures.ON_SLURM


@pytest.fixture
def login_token() -> Iterator[None]:
    """A token in the profile of this user's login shell, for a while."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    names = [home / name for name in (".bash_profile", ".bash_login", ".profile")]
    path = next((path for path in names if path.exists()), names[-1])
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(b"export LOGIN_TOKEN=" + PLANTED.encode() + b"\n" + (before or b""))
    try:
        yield
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


def test_no_token_reaches_a_stage(login_token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = subprocess.run(
        ["sbatch", "--wait", "--export=PATH", f"--output={tmp_path}/loaded", "--wrap=env"], timeout=120, check=False
    )
    assert loaded.returncode == 0 and f"LOGIN_TOKEN={PLANTED}" in (tmp_path / "loaded").read_text(), (
        "what is to be kept out"
    )

    for name, value in {**SECRETS, "SLURM_PLANTED_TOKEN": PLANTED}.items():
        if name != "SLURM_JWT":  # which this cluster's own commands would want to use
            monkeypatch.setenv(name, value)
    environment = {
        "PYTHONPATH": f"{slurm_fixtures.ROOT}:{verdict_fixtures.python_path(tmp_path)}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment["NAMED_BY_THE_PROFILE"] = "x"
    setup = [f"export {name}={PLANTED}" for name in ("SETUP_TOKEN", "AWS_SESSION_TOKEN", "GITLABTOKEN", "OF_SETUP")]
    settings = cluster_profile.load(slurm_fixtures.write_profile(tmp_path, environment=environment, setup=setup))
    store, graph = Store(tmp_path / "home"), verdict_fixtures.graph(tmp_path / "act", "environment", ranks=1)
    (name,) = graph.nodes
    submission = slurm.submit(graph, store, [name], settings, "dev")
    job = submission.submitted[name]
    child = slurm_fixtures.until(lambda: next((tmp_path / "act").glob("child.environ"), None), "a child of the stage")
    processes = {"child": int(child.with_name("child").read_text())}
    processes |= {path.name: int(path.read_text()) for path in (tmp_path / "act").glob("pid-*")}
    assert len(processes) == 2
    for role, pid in processes.items():
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert PLANTED.encode() not in environ and PLANTED.replace("-", "").encode() not in environ, (role, environ)
        names = {entry.partition(b"=")[0].decode() for entry in environ.split(b"\0")}
        assert {
            "PATH",
            "HOME",
            "ATOM_HOME",
            "GLOO_SOCKET_IFNAME",
            "NAMED_BY_THE_PROFILE",
            "SLURM_JOB_ID",
            "SLURM_PROCID",
        } <= names
        assert not {"LOGIN_TOKEN", "SETUP_TOKEN"} & names
    outside_setup = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/environ")
        if f"SLURM_JOB_ID={job}".encode() in (text := _read(path)) and (b"LOGIN_TOKEN" in text or b"HF_TOKEN" in text)
    ]
    assert not outside_setup, "nor is it in any other process of the job"
    script = next(submission.run.folder.glob("*/submitit/*_submission.sh")).read_text()
    without_setup = [line for line in script.splitlines() if line not in setup]
    assert "#SBATCH --export=NIL" in without_setup and PLANTED not in "\n".join(without_setup)
    (tmp_path / "act" / "go").touch()
    slurm_fixtures.until(lambda: store.sealed(graph.nodes[name].key), "its end")
    log = next(submission.run.folder.glob("*/submitit/*_0_log.out")).read_text()
    assert "restarts without" in log and "SETUP_TOKEN" in log and PLANTED not in log


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""
