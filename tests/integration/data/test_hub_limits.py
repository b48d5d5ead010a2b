"""What is read from a Hub is bounded over all tasks, and a Hub that throttles, fails, cuts and is slow changes no byte."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.responses import JSONResponse, Response

from pipeline.core.errors import AtomError, MachineError
from pipeline.graph import recipe as recipes
from pipeline.hub import client, limits
from pipeline.hub.limits import Slot
from stages.data import pinning
from stages.data.acquire import acquire_stage, hub_files
from stages.data.acquire.hub_files import LockedSource
from tests.fixtures import ROOT
from tests.fixtures.hub_fixtures import REPO, Hub, acquire_config, lines, write_recipe
from tests.fixtures.run_fixtures import atom


def texts(name: str, kilobytes: int) -> bytes:
    """A file whose compressed size is about that."""
    drawn = random.Random(name)
    return lines(*(f"{name} {n} {drawn.randbytes(512).hex()}" for n in range(2 * kilobytes)))


FILES = {f"data/{name}.jsonl.gz": texts(name, 400) for name in "abc"}


class Troubled:
    """The behavior of a Hub that answers each request for a path badly for some times, and is slow.

    Attributes:
        troubles: What it does in turn: `429`, `window`, `503`, `cut`.
        done: How often it did each.
    """

    def __init__(self, hub: Hub, troubles: tuple[str, ...]) -> None:
        self.hub, self.troubles, self.seen = hub, troubles, Counter[str]()
        self.done = Counter[str]()

    def __call__(self, scope: Any) -> Any:
        place = f"{scope['method']} {scope['path']}"
        self.seen[place] += 1
        number = self.seen[place] - 1
        trouble = self.troubles[number] if number < len(self.troubles) else ""
        self.done[trouble] += 1
        window = {"RateLimit": '"resolvers";r=0;t=0', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}
        answers = {
            "429": JSONResponse({"error": "slow down"}, 429, {"Retry-After": "0"}),
            "window": JSONResponse({"error": "slow down"}, 429, window),
            "503": Response(status_code=503),
        }
        return answers.get(trouble) or self._slow(cut=trouble == "cut")

    def _slow(self, cut: bool) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def slowly(message: Any) -> None:
                await asyncio.sleep(0.01)
                body = message.get("body", b"")
                if cut and body:
                    await send({**message, "body": body[: len(body) // 2], "more_body": True})
                    raise ConnectionResetError("cut by the test")
                await send(message)

            await self.hub.app(scope, receive, slowly)

        return answer


def pinned(folder: Path) -> Path:
    path = write_recipe(folder, parts=3, license_field="meta.license")
    assert [row.name for row in pinning.pin(path)] == ["notes"]
    return path


def test_a_troubled_hub_gives_the_same_bytes(hub: Hub, tmp_path: Path, run_stage: Any, monkeypatch: Any) -> None:
    """Of pin with its sample, and of acquire."""
    hub.commit(FILES)
    path = pinned(tmp_path)
    lock, digest = recipes.lock_of(path), run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {}).digest
    before = lock.read_bytes()
    lock.unlink()
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "other home"))

    hub.behavior = troubled = Troubled(hub, ("429", "503", "cut"))
    pinned(tmp_path)
    assert lock.read_bytes() == before
    assert min(troubled.done[each] for each in ("429", "503", "cut")) >= 3, "of each file's ranges at least"

    hub.behavior = troubled = Troubled(hub, ("window", "cut"))
    artifact = run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    assert artifact.digest == digest and troubled.done["window"] == 6 and troubled.done["cut"] >= 3


def test_a_probe_that_is_cut_says_so_and_keeps_what_it_learnt(hub: Hub, tmp_path: Path) -> None:
    """By the command: one sentence, exit code 2; the next one goes on."""
    hub.commit(FILES)
    hub.add("local/other", {"data/x.jsonl.gz": texts("x", 40)})
    path = write_recipe(tmp_path, license_field="meta.license")
    body = yaml.safe_load(path.read_text())
    (notes,) = body["sources"]
    body["sources"].append({**notes, "name": "other", "reader": {**notes["reader"], "repo": "local/other"}})
    path.write_text(yaml.safe_dump(body))
    always_cut, served = Troubled(hub, ("cut",) * 99), list[str]()

    def cut(scope: Any) -> Any:
        if REPO in scope["path"] and scope["path"].endswith(".gz"):
            served.append(scope["path"])
            return always_cut(scope) if len(served) > 1 else None
        return None

    hub.behavior = cut
    home = tmp_path / "home"
    stderr = atom(home, "pin", str(path), code=2).stderr

    assert stderr.startswith("atom: source notes: reading ") and stderr.count("\n") == 1
    assert "interrupts or corrupts its answer" in stderr and stderr.endswith("; 1 of 2 sources are in order\n")
    learnt = hub_files.read(recipes.lock_of(path))
    assert learnt["notes"].probe and learnt["notes"].probe.pieces == 1 and len(learnt["notes"].rows()) == 3
    assert learnt["other"].probe and not learnt["other"].probe.problem
    hub.behavior = lambda scope: None
    hub.sent.clear()
    atom(home, "pin", str(path))
    whole = hub_files.read(recipes.lock_of(path))
    assert whole["notes"].probe and whole["notes"].probe.pieces == 3 and whole["other"] == learnt["other"]
    assert "x.jsonl.gz" not in hub.sent


TASK = """
import sys
from stages.data.acquire import acquire_stage
from tests.fixtures.hub_fixtures import acquire_config
from pathlib import Path
acquire_stage.run_shard(acquire_config(Path(sys.argv[1])), {}, Path(sys.argv[2]), int(sys.argv[3]))
"""


def test_bounds_hold_over_all_tasks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks of two files each, which know nothing of each other, share two slots and 2 MB/s."""
    files = {f"data/{n}.jsonl.gz": texts(str(n), 1000) for n in range(6)}
    least = min(map(len, files.values()))
    hub.commit(files)
    path = write_recipe(tmp_path, parts=3)
    assert [row.name for row in pinning.pin(path, sample=False)] == ["notes"]
    for name, value in ((limits.SLOTS, "2"), (limits.MEGABYTES, "2")):
        monkeypatch.setenv(name, value)
    begun, now, most = list[float](), [0], [0]

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        begun.append(time.monotonic())
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.2)  # so that tasks that were not bounded would be there together
        await hub.app(scope, receive, send)
        now[0] -= 1

    hub.behavior = lambda scope: counted if scope["method"] == "GET" and scope["path"].endswith(".gz") else None
    command = [sys.executable, "-c", TASK, str(path), str(tmp_path / "work")]
    tasks = [subprocess.Popen([*command, str(part)], cwd=ROOT) for part in range(3)]
    assert [task.wait(120) for task in tasks] == [0, 0, 0]

    assert len(begun) == 6 and most[0] <= 2
    # One of two slots has three files or more, and the third begins when two have passed at 1 MB/s.
    assert max(begun) - min(begun) >= 2 * least / 1e6
    assert not [row for row in (tmp_path / "home/hub").rglob(".pulling")]


def test_requests_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    monkeypatch.setenv(limits.SLOTS, "2")
    monkeypatch.setenv(limits.REQUESTS, "1200")
    start = time.monotonic()
    with Slot() as slot:
        for _ in range(6):
            slot.request()
    assert time.monotonic() - start >= 0.6, "ten a second for each of two slots, and the slot is kept until then"
    assert slot.waited >= 0.4, "what a deadline of the reading does not count"
    for value in ("many", "-1", "0", "1e3", "99999999999999"):
        monkeypatch.setenv(limits.SLOTS, value)
        with pytest.raises(AtomError, match=f"ATOM_HUB_SLOTS = '{value}' is no whole number from 1 to 1000") as caught:
            Slot()
        assert caught.value.exit_code == 2


def test_a_slot_leaves_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    monkeypatch.setenv(limits.SLOTS, "1")
    for _ in range(110):
        with Slot() as slot:
            slot.take()
    left = sorted(int(path.suffix[1:]) for path in (tmp_path / "hub-slots/0").glob("lease.*"))
    assert left == list(range(left[0], left[0] + len(left))) and len(left) <= 101


def test_slots_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    (tmp_path / "hub-slots").touch()
    with pytest.raises(MachineError, match="hub-slots/[0-7] cannot be written .*; check ATOM_HOME"):
        Slot().take()


def test_a_wait_for_a_slot_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    monkeypatch.setenv(limits.SLOTS, "1")
    with Slot() as held:
        held.take()
        waiting = Slot()
        waiting._stopped.set()
        with pytest.raises(MachineError, match="stopped before a slot"):
            waiting.take()
    with waiting:
        waiting.take()


def test_the_wait_is_what_the_hub_states() -> None:
    """The real Hub states the seconds until its window of five minutes ends, and no Retry-After."""
    errors = client.load().errors

    def pause(status: int, headers: dict[str, str], attempt: int = 0) -> float | None:
        response = client._http().Response(status, headers=headers, request=client._http().Request("GET", "http://x"))
        return client._pause(errors.HfHubHTTPError("no", response=response), attempt)

    window = {"RateLimit": '"resolvers";r=0;t=40', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}
    assert pause(429, window) == 41 and pause(429, {"Retry-After": "7"}) == 7 and pause(503, window, 3) == 8
    assert pause(429, {"RateLimit": '"api";r=0;t=300'}) == client.MAX_RETRY_SECONDS
    assert client.MAX_RETRY_SECONDS * (client.ATTEMPTS - 1) > 300, "all waits together outlast the window"
    assert pause(404, {}) is None


def test_a_terabyte_is_divided_among_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 files of 256 MB in 400 parts: each file is in one part, and a task holds the rows of a list, not the files."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    path = write_recipe(tmp_path, parts=400)

    def locked(files: int) -> acquire_stage.AcquireConfig:
        rows = "".join(f"sha256:{n:064x} 256000000 data/{n:06d}.jsonl.gz\n" for n in range(files))
        entry = LockedSource(repo=REPO, requested="main", revision="1" * 40, pattern="data/*.jsonl.gz", files=rows)
        hub_files.write(recipes.lock_of(path), {"notes": entry})
        return acquire_config(path)

    def held(files: int) -> int:
        """Bytes that a task holds to know its files."""
        source = locked(files).source
        hub_files._read_version.cache_clear()
        hub_files._rows.cache_clear()
        tracemalloc.start()
        source.files_of(7)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    source = locked(4000).source
    parts = [source.files_of(part) for part in range(400)]
    assert [file for part in parts for file in part] == source.files() and {len(part) for part in parts} == {10}
    assert sum(file.size for file in hub_files.read(recipes.lock_of(path))["notes"].rows()) > 1e12
    assert acquire_stage.STAGE.shards is not None and acquire_stage.STAGE.shards(locked(4000)) == 400
    # The law of a task's memory: at most 4 kB for each file of the source, nothing for its bytes.
    assert (held(8000) - held(4000)) / 4000 < 4000
