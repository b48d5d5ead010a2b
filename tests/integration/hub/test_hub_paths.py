"""A hostile Hub whose headers, JSON fields or listings would name a path outside the temporary folder.

The server looks at the folders at every request, so a file that appears only during a transfer is seen as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import SOAK

SHA = "a" * 40
BLOB = "b" * 40
ETAG = f'"{BLOB}"'
UP = "x/" + "../" * 6
"""Leads from the name of README.md's download to the folder of the case."""
SHORT_HASH = base64.urlsafe_b64encode(hashlib.sha1(b"README.md.metadata").digest()).decode()
"""The first part of the name under which the client downloads README.md; a folder of this name plus `.x` makes the
path of an ETag `x/../…` exist."""
BRIDGE = f"{SHORT_HASH}.x/y.txt"


@dataclass(frozen=True)
class Hostile:
    """What a Hub sends. says: a part of the sentence. head: headers of README.md; commit: X-Repo-Commit; sha: commit of
    the repository's JSON; names: files of the first listing; second: of the listings after it."""

    says: str
    head: dict[str, str] = field(default_factory=dict)
    commit: str = SHA
    sha: str = SHA
    names: tuple[str, ...] = ("README.md",)
    second: tuple[str, ...] = ()


BODY = b"x" * 100
OUTSIDE = "{outside}"
"""Stands for the absolute path of a file outside the temporary folder."""
NO_RELEASE = "which no release has"
NOTHING = "it has no SHA256SUMS"
"""Said of a harmless repository that is no release."""
CASES = {
    "an ETag that leads out": Hostile("the ETag", {"ETag": f'"{UP}out"'}, names=("README.md", BRIDGE)),
    "a linked ETag that leads out": Hostile("the X-Linked-ETag", {"X-Linked-ETag": f'"{UP}out"'}),
    "an absolute ETag": Hostile("the ETag", {"ETag": OUTSIDE}),
    "a weak ETag with a slash": Hostile("the ETag", {"ETag": 'W/"a/b"'}),
    "an ETag of two dots": Hostile("the ETag", {"ETag": '".."'}),
    "an empty ETag": Hostile("the ETag", {"ETag": '""'}),
    "a long ETag": Hostile("the ETag", {"ETag": f'"{"b" * 300}"'}),
    "an ETag that clears the screen": Hostile("the ETag", {"ETag": '"\x1b[2Jx"'}),
    "an ETag with NUL": Hostile("corrupts its answer", {"ETag": '"a\0b"'}),
    "an ETag with a backslash": Hostile("the ETag", {"ETag": '"..\\\\..\\\\out"'}),
    "a commit that leads out": Hostile("the X-Repo-Commit", commit=f"{UP}out"),
    "an absolute commit": Hostile("the X-Repo-Commit", commit=OUTSIDE),
    "a commit of the JSON that leads out": Hostile("malformed answer", sha=f"../../../../../{'x' * 9}"),
    "an absolute commit of the JSON": Hostile("malformed answer", sha=OUTSIDE),
    "a second listing that leads out": Hostile(NOTHING, second=("../../../../out", "README.md")),
    "a second listing of the client's files": Hostile(NOTHING, second=(".cache/huggingface/.gitignore", "README.md")),
    "a name that is too long": Hostile(NO_RELEASE, names=("x" * 300,)),
    "a path that is too long": Hostile(NO_RELEASE, names=("x/" * 3000 + "y",)),
    "a name with NUL": Hostile(NO_RELEASE, names=("a\0b",)),
    "a file that is a folder": Hostile(NO_RELEASE, names=("a", "a/b")),
    "a name of a header": Hostile(NOTHING, {"Content-Disposition": f'attachment; filename="{UP}out"'}),
    "a redirect that leads out": Hostile(NOTHING, {"Location": f"/a/b/resolve/main/{UP}out"}),
}
REPEATED = {
    "a linked ETag that leads out", "a weak ETag with a slash", "an empty ETag", "an ETag that clears the screen",
    "an ETag with NUL", "an ETag with a backslash", "a commit that leads out", "an absolute commit of the JSON",
    "a second listing of the client's files", "a path that is too long", "a name with NUL", "a name of a header",
}  # fmt: skip
"""What other cases resemble; `make soak PART=release` runs these, too. Each is a process that imports the client."""
if not SOAK:
    CASES = {name: case for name, case in CASES.items() if name not in REPEATED}


def start(case: Hostile, folder: Path, seen: set[str]) -> ThreadingHTTPServer:
    """A Hub with one repository. seen: gets every path that appears in the folder, except below `tmp`."""
    listings, has_bridge = [], threading.Event()
    if BRIDGE not in case.names:
        has_bridge.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            seen.update(appeared(folder))
            text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            start_line = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body)}\r\n"
            self.wfile.write((start_line + text + "\r\n").encode("latin-1"))
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                seen.update(appeared(folder))
                self.wfile.write(body[len(body) // 2 :])

        def do_GET(self) -> None:
            filled = {name: value.replace(OUTSIDE, f"{folder}/out") for name, value in case.head.items()}
            sha, commit = (text.replace(OUTSIDE, f"{folder}/out") for text in (case.sha, case.commit))
            if "/tree/" in self.path:
                listings.append(self.path)
                names = case.second if case.second and len(listings) > 1 else case.names
                rows: list[Any] = [{"type": "file", "path": n, "size": len(BODY), "oid": BLOB} for n in names]
                self.send(json.dumps(rows).encode(), {"Content-Type": "application/json", "ETag": 'W/"64-a/b+c"'})
            elif self.path.startswith("/api/"):
                body = {
                    "id": "a/b", "sha": sha, "private": False, "tags": [],
                    "siblings": [{"rfilename": name} for name in case.names],
                }  # fmt: skip
                self.send(json.dumps(body).encode(), {"Content-Type": "application/json", "ETag": 'W/"64-a/b+c"'})
            elif self.command == "HEAD" and "Location" in filled and "out" not in self.path:
                self.send(b"", filled, 302)
            elif self.path.endswith("README.md"):
                has_bridge.wait(60)  # the folder is there that the path of its ETag goes through
                headers = {"ETag": ETAG, "X-Repo-Commit": commit, **filled}
                headers.pop("Location", None)
                self.send(BODY, headers)
            else:
                if self.command == "GET":
                    has_bridge.set()
                self.send(BODY, {"ETag": ETAG, "X-Repo-Commit": commit})

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
