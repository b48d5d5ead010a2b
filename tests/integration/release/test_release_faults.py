"""Publishing with the real client while every request of it fails once, each in one of four ways."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import JSONResponse

from pipeline.launch.rendezvous import free_port
from release.hub.local.app import make_app
from release.hub.local.server import LOCAL_TOKEN
from tests.fixtures.run_fixtures import at_length

WAYS = ("busy", "gone", "lost answer", "slow down")


class Faulty:
    """The Hub, but for the first occurrence of each distinct request: method and path."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.requests: set[str] = set()
        self.failed: dict[str, str] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        label = f"{scope.get('method')} {scope.get('path')}"
        if scope["type"] != "http" or label in self.requests or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        self.requests.add(label)
        way = self.failed[label] = WAYS[len(self.failed) % len(WAYS)]
        if way == "lost answer":  # it was done, and nobody hears of it

            async def deaf(message: Any) -> None: ...

            await self.app(scope, receive, deaf)
        if way == "gone":
            return None  # the connection ends without an answer of ours: the server says 500
        status, headers = {"busy": (503, {}), "slow down": (429, {"Retry-After": "1"}), "lost answer": (502, {})}[way]
        return await JSONResponse({"error": way}, status, headers)(scope, receive, send)


@at_length("release", 600)
@pytest.mark.timeout(3600)
def test_every_request_fails_once_and_the_publication_is_finished(client, release: Path, tmp_path: Path) -> None:
    hub, port = tmp_path / "hub", free_port()
    app = Faulty(make_app(hub, {LOCAL_TOKEN: "local"}))
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    code = """
report, said = None, []
while report is None:
    try:
        report = publish(release, "local", public=True)
    except AtomError as error:
        assert "\\n" not in str(error) and "hf_local" not in str(error), error
        said.append(str(error))
        opened = [r for r in ("-data", "-evidence", "-checkpoints", "-base", "") if is_open("local/tiny" + r)]
        assert not opened or opened == ["-data", "-evidence", "-checkpoints", "-base", ""][: len(opened)], opened
        assert len(said) < 600, said[-5:]
assert not sum(r.files_sent for r in publish(release, "local", public=True).repositories)
for suffix in ("", "-base", "-data", "-evidence", "-checkpoints", "-checkpoints@pretrain-step-2"):
    found = verify("local/tiny" + suffix); assert found.ok, found.to_json()
print(json.dumps(said))
"""
    state = f"""
def is_open(repo):
    import httpx2 as http
    return any(http.get("http://127.0.0.1:{port}/api/" + kind + "/" + repo).status_code == 200 for kind in ("models", "datasets"))
"""
    try:
        process = client(state + code, f"http://127.0.0.1:{port}", timeout=3500)
    finally:
        server.should_exit = True
        thread.join(10)
    report = json.loads(process.stdout.splitlines()[-1])
    assert len(app.failed) >= 8 and set(app.failed.values()) == set(WAYS)
    print(f"{len(app.failed)} of {len(app.requests)} requests failed once, {len(report)} publications ended early")
    assert not any(LOCAL_TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
