"""Publications that are killed at any of their requests, and two at once: the Hub never ends with a mixture."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pipeline.launch.rendezvous import free_port
from release.assembly import build_release as builder
from release.hub.local.app import make_app
from release.hub.local.server import IDLE_SECONDS, LOCAL_TOKEN
from release.hub.local.store import Commit, HubStore, current_time
from tests.fixtures import ROOT
from tests.fixtures.publish_fixtures import PRELUDE, build_another
from tests.fixtures.run_fixtures import SOAK, at_length

PUBLISH = """
from dataclasses import asdict
import release.hub.publish as p
if sys.argv[2] == "unverified": p.verify = lambda *a, **k: verify(*a, **k) if k else type("V", (), {"require": lambda self: None, "digest": ""})()
try: print(json.dumps(asdict(publish(release, "local", public=sys.argv[3] == "public"))))
except AtomError as error:
    print(f"atom: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
"""Publishes, and with `unverified` looks at the local files only once they are pulled back."""
CHANGING = ("POST", "PUT", "DELETE", "PATCH")
ANOTHER = "another publication is at work, or was just now; run this again once it has ended"


class Hub:
    """The local Hub in this process. meet: called with method and path of each request that changes something, in a
    thread; returns whether the Hub acts on it, and whether it answers."""

    def __init__(self, root: Path, port: int) -> None:
        self.endpoint, self.app = f"http://127.0.0.1:{port}", make_app(root, {LOCAL_TOKEN: "local"}, lfs_bytes=2000)
        self.store = HubStore(root)
        self.meet: Callable[[str], tuple[bool, bool]] = lambda request: (True, True)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        acts, answers = True, True
        if scope["type"] == "http" and scope["method"] in CHANGING:
            acts, answers = await asyncio.to_thread(self.meet, f"{scope['method']} {scope['path']}")

        async def silence(message: Any) -> None: ...

        if acts:
            await self.app(scope, receive, send if answers else silence)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    served = Hub(tmp_path / "hub", port := free_port())
    config = uvicorn.Config(
        served, "127.0.0.1", port, log_level="critical", access_log=False, timeout_keep_alive=IDLE_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield served
    server.should_exit = True
    thread.join(10)


def start(release: Path, hub: Hub, home: str, check: str = "unverified", public: str = "") -> subprocess.Popen[str]:
    env = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(release.parent / home), "PYTHONPATH": str(ROOT),
        "HF_TOKEN": LOCAL_TOKEN,
    }  # fmt: skip
    command = [sys.executable, "-c", PRELUDE + PUBLISH, str(release), check, public]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def require_published(release: Path, hub: Hub, public: str = "") -> None:
    """The next publication sends nothing, and what the Hub has is the release."""
    process = start(release, hub, "last", "verified", public)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert '"files_sent": 0' in out and '"files_sent": 1' not in out


def killer(
    process: subprocess.Popen[str], number: int, acts: bool, requests: list[str]
) -> Callable[[str], tuple[bool, bool]]:
    """Kills a process at the request of that number. acts: whether the request still has its effect."""
    counted: list[str] = []

    def meet(request: str) -> tuple[bool, bool]:
        counted.append(request)
        requests.append(request)
        if len(counted) != number:
            return True, True
        os.kill(process.pid, signal.SIGKILL)
        return acts, False

    return meet


@at_length("release", 240)
@pytest.mark.parametrize("public", ["", "public"])
def test_a_publication_that_is_killed_at_every_few_requests_ends_verified(copy: Path, hub: Hub, public: str) -> None:
    """With kill -9, alternately before a request has an effect and after it, while its answer is awaited."""
    every, kills, requests = (3 if SOAK else 9), 0, list[str]()
    while True:
        process = start(copy, hub, "hf", public=public)
        # Later, since each attempt first asks what is there already, and would else never come further.
        hub.meet = killer(process, every + kills // 8, acts=kills % 2 == 1, requests=requests)
        _, err = process.communicate(timeout=240)
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        assert kills < 200, requests
    assert process.returncode == 0, err
    assert kills >= 4, requests
    hub.meet = lambda request: (True, True)
    require_published(copy, hub, public)


POINTS = [
    pytest.param(point, marks=at_length("release", 60))
    for point in ("a staging branch", "another release", "a second commit", "a tag", "the Space")
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_of_two_publications_at_once_one_ends_verified_and_the_other_says_so(
    source: builder.BuildInput, copy: Path, hub: Hub, point: str, tmp_path: Path
) -> None:
    """The second runs from its beginning to its end while the first is held at one of its requests."""
    public, other_release = "", copy
    if point == "another release":
        other_release = build_another(source, tmp_path / "other")
    if point == "a staging branch":
        public = "public"
        first = start(copy, hub, "setup", public=public)
        assert first.wait(240) == 0, first.stderr and first.stderr.read()
        remove_from_main(hub, "config.json")
    commits, other, held = [0], dict[str, Any](), threading.Event()

    def matches(request: str) -> bool:
        commits[0] += "/commit/" in request
        if point in ("a second commit", "another release"):
            return "/commit/" in request and commits[0] == 2
        marks = {"a staging branch": "/commit/upload-", "a tag": "/tag/", "the Space": "tiny-page/commit/"}
        return marks[point] in request

    def meet(request: str) -> tuple[bool, bool]:
        if held.is_set() or not matches(request):
            return True, True
        held.set()
        second = start(other_release, hub, "second", public=public)
        other["out"], other["err"] = second.communicate(timeout=240)
        other["code"] = second.returncode
        return True, True

    hub.meet = meet
    first = start(copy, hub, "first", public=public)
    _, err = first.communicate(timeout=300)
    assert held.is_set()
    assert other["code"] == 0, other["err"]
    if first.returncode or point in ("another release", "a staging branch"):
        ends = (ANOTHER, "other bytes; raise the recipe's version and build again")
        assert first.returncode == 2 and err.startswith("atom: ") and err.strip().endswith(ends), err
    hub.meet = lambda request: (True, True)
    require_published(other_release, hub, public)


def remove_from_main(hub: Hub, path: str) -> None:
    repo = hub.store.load("model", "local/tiny")
    assert repo is not None
    files = dict(repo.commits[repo.branches["main"]].files)
    del files[path]
    repo.add("main", Commit(repo.branches["main"], "t", "", "local", current_time(), files))
    hub.store.save(repo)


@at_length("release", 60)
def test_publications_that_race_never_fail_in_other_words(copy: Path, hub: Hub) -> None:
    processes = [start(copy, hub, f"hf-{number}") for number in range(3)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    for err, code in ends:
        assert code == 0 or (code == 2 and err.startswith("atom: ") and err.strip().endswith(ANOTHER)), (code, err)
    assert 0 in [code for _, code in ends]
    require_published(copy, hub)


def test_the_local_hub_loses_no_commit_to_one_that_arrives_slowly(hub: Hub) -> None:
    """Its body comes in two pieces, and another commit between them."""
    repo = hub.store.create("model", "local/slow", False, "local")
    head, port = repo.branches["main"], int(hub.endpoint.rpartition(":")[2])

    def body(path: str) -> bytes:
        content = {"path": path, "content": base64.b64encode(b"{}").decode(), "encoding": "base64"}
        header = {"key": "header", "value": {"summary": "s", "parentCommit": head}}
        return json.dumps(header).encode() + b"\n" + json.dumps({"key": "file", "value": content}).encode()

    def request(data: bytes) -> bytes:
        lines = (
            f"POST /api/models/local/slow/commit/main HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {LOCAL_TOKEN}\r\n"
        )
        return (lines + f"Content-Length: {len(data)}\r\n\r\n").encode() + data

    with (
        socket.create_connection(("127.0.0.1", port), 30) as slow,
        socket.create_connection(("127.0.0.1", port), 30) as fast,
    ):
        message = request(body("slow.json"))
        slow.sendall(message[:-10])
        time.sleep(0.2)
        fast.sendall(request(body("fast.json")))
        assert fast.recv(20).split()[1] == b"200"
        slow.sendall(message[-10:])
        assert slow.recv(20).split()[1] == b"412"
    present = hub.store.load("model", "local/slow")
    assert present is not None and "fast.json" in present.commits[present.branches["main"]].files
