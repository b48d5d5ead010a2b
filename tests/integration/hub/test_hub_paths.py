"""A repository whose listing names paths outside the temporary folder, or none that a file system has.

The server looks at the folders at every request, so a file that appears only during a transfer is seen as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import ROOT

SHA = "a" * 40
BLOB = "b" * 40
ETAG = f'"{BLOB}"'


@dataclass(frozen=True)
class Hostile:
    """What a repository holds. says: a part of the sentence; names: files of the first listing; second: of the listings
    after it."""

    says: str
    names: tuple[str, ...] = ("README.md",)
    second: tuple[str, ...] = ()


BODY = b"x" * 100
NO_RELEASE = "which no release has"
NOTHING = "it has no SHA256SUMS"
"""Said of a harmless repository that is no release."""
CASES = {
    "a path that leads out": Hostile(NO_RELEASE, ("../../out",)),
    "a path into the cache": Hostile(NO_RELEASE, (".cache/x.py",)),
    "a name that clears the screen": Hostile(NO_RELEASE, ("\x1b[2Jx",)),
    "a name that is too long": Hostile(NO_RELEASE, ("x" * 300,)),
    "a path that is too long": Hostile(NO_RELEASE, ("x/" * 3000 + "y",)),
    "a name with NUL": Hostile(NO_RELEASE, ("a\0b",)),
    "a file that is a folder": Hostile(NO_RELEASE, ("a", "a/b")),
    "a second listing that leads out": Hostile(NOTHING, second=("../../../../out", "README.md")),
}


def start(case: Hostile, folder: Path, seen: set[str]) -> ThreadingHTTPServer:
    """A Hub with one repository. seen: gets every path that appears in the folder, except below `tmp`."""
    listings = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send(self, body: bytes, headers: dict[str, str]) -> None:
            seen.update(appeared(folder))
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            if "/tree/" in self.path:
                listings.append(self.path)
                names = case.second if case.second and len(listings) > 1 else case.names
                rows: list[Any] = [{"type": "file", "path": n, "size": len(BODY), "oid": BLOB} for n in names]
                self.send(json.dumps(rows).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in case.names]
                body = {"id": "a/b", "sha": SHA, "private": False, "tags": [], "siblings": siblings}
                self.send(json.dumps(body).encode(), {"Content-Type": "application/json"})
            else:
                self.send(BODY, {"ETag": ETAG, "X-Repo-Commit": SHA})

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def appeared(folder: Path) -> set[str]:
    """The paths of a case's folder, and those beside it that a path upwards would reach, except below `tmp`."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    outer = {f"../{path.name}" for path in folder.parent.iterdir() if not path.name.startswith("case-")}
    top = {str(path) for path in Path("/").glob("out*")}
    return {path for path in paths if not path.startswith("tmp/")} | outer | top


@dataclass
class Run:
    """A client that runs. seen: what appeared outside its temporary folder."""

    process: subprocess.Popen[str]
    seen: set[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    root = tmp_path_factory.mktemp("hostile")
    runs, servers = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        folder, seen = root / f"case-{number}", set[str]()
        for part in ("tmp", "cwd", "hf"):
            (folder / part).mkdir(parents=True)
        servers.append(start(case, folder, seen))
        env = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{servers[-1].server_port}", "HF_HOME": str(folder / "hf"),
            "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT), "ATOM_HOME": str(folder / "home"),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "verify", "a/b"], env=env, cwd=folder / "cwd",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        runs[name] = Run(process, seen)
    yield runs
    for run in runs.values():
        run.process.kill()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", CASES)
def test_nothing_appears_outside_the_temporary_folder(name: str, runs: dict[str, Run]) -> None:
    run, says = runs[name], CASES[name].says
    _, err = run.process.communicate(timeout=240)
    assert run.seen == {"tmp", "cwd", "hf"}
    progress, sentence = err.splitlines()
    assert progress == "downloading a/b"
    assert sentence.startswith("atom: ") and says in sentence and sentence.isprintable()
    assert run.process.returncode == (1 if says == NO_RELEASE else 2)
