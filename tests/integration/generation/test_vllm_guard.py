"""The guard of vLLM servers: over HTTP in a process of its own, in front of an application that has every route."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.core import environment
from pipeline.core.errors import AtomError
from pipeline.run_secret import atom_secret
from pipeline.run_secret.atom_secret import UnusableSecret, sign
from stages.generation import vllm_server, weights
from stages.generation.vllm_sampler import VllmServer
from stages.generation.vllm_server import Server, ServerLost
from stages.generation.vllm_worker.atom_group import SignedStore, connect
from stages.generation.weights import Broadcast
from stages.models.parallel_layout import Layout
from stages.train.parallel import Ranks
from tests.fixtures import weights_fixtures
from tests.fixtures.vllm_fixtures import CHANGED, TENSORS, fakes, sampler, secret  # noqa: F401 - fixtures

SERVER = """
import sys, uvicorn, atom_guard
async def every(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message.get("body", b"")
    print(scope["method"], scope["path"], flush=True)
    if body == b'{"fail": 1}':
        raise RuntimeError("the worker said [[no]]")
    if body == b'{"busy": 1}':
        raise RuntimeError("the worker is busy")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'{"got": ', "more_body": True})
    await send({"type": "http.response.body", "body": b"%d}" % len(body)})
uvicorn.run(atom_guard.Guard(every), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", lifespan="off")
"""
DIGEST = hashlib.sha256(b"{}").hexdigest()


class Guarded:
    """A server behind the guard. reached: the requests that came through."""

    def __init__(self, folder: Path, secret: Path, port: int) -> None:
        self.log, self.port = folder / "reached", port
        variables = {"PYTHONPATH": vllm_server.environment()["PYTHONPATH"], atom_secret.VARIABLE: str(secret)}
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER, str(port)], env={**os.environ, **variables}, stdout=out
            )

    @property
    def reached(self) -> list[str]:
        return self.log.read_text().splitlines()

    def raw(self, method: str, path: str, headers: dict[str, str], body: bytes = b"{}") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def guarded(tmp_path: Path, secret: Path) -> Iterator[Guarded]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Guarded(tmp_path, secret, port)
    yield server
    server.end()


@pytest.fixture
def client(guarded: Guarded, secret: Path) -> Server:
    server = Server(f"http://127.0.0.1:{guarded.port}", secret)
    server.wait(60)
    return server


def proof(
    key: bytes, instance: str, path: str = "/pause", method: str = "POST", digest: str = DIGEST
) -> dict[str, str]:
    nonce = secrets.token_hex(16)
    signature = sign(key, "request", method, path, instance, nonce, digest)
    return {"Atom-Nonce": nonce, "Atom-Body": digest, "Atom-Signature": signature}


def test_only_signed_requests_of_known_paths_come_through(guarded: Guarded, client: Server, secret: Path) -> None:
    key, instance = atom_secret.read(secret), client.instance
    assert client.post("/pause?mode=keep", {"a": "b"}) == {"got": 10}
    assert client.post("/inference/v1/generate", {"x": "y" * 3_000_000}) == {"got": 3_000_009}
    with pytest.raises(AtomError, match="refuses the weights: no$"):
        client.post("/update_weights", {"fail": 1}, attempts=1)
    reached = guarded.reached
    assert reached[-3:-1] == ["POST /pause", "POST /inference/v1/generate"]
    good = proof(key, instance)
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        for path in ("/health", "/pause", "/v1/models", "/metrics", "/collective_rpc", "/docs", "//pause", "/"):
            for headers in (
                {}, {"Authorization": f"Bearer {secret.read_text()}"}, {**good, "Atom-Signature": ""},
                {**good, "Atom-Signature": "ü".encode().decode("latin-1")}, proof(bytes(32), instance, path, method),
            ):  # fmt: skip
                assert guarded.raw(method, path, headers)[0] == 401, (method, path, headers)
    changed = {
        "another method": guarded.raw("PUT", "/pause", good),
        "another path": guarded.raw("POST", "/resume", good),
        "another query": guarded.raw("POST", "/pause?mode=abort", good),
        "another body": guarded.raw("POST", "/pause", good, b"[]"),
        "another nonce": guarded.raw("POST", "/pause", {**good, "Atom-Nonce": "m" * 32}),
        "another start": guarded.raw("POST", "/pause", proof(key, "0" * 32)),
        "without a start": guarded.raw("POST", "/pause", proof(key, "")),
        "an answer's": guarded.raw("POST", "/pause", {**good, "Atom-Signature": sign(key, "answer", "POST")}),
    }
    assert {name: status for name, (status, _) in changed.items() if status != 401} == {}
    for path in ("/collective_rpc", "/server_info", "/sleep", "/v1/chat/completions", "/pause/", "/docs"):
        status, body = guarded.raw("POST", path, proof(key, instance, path))
        assert (status, json.loads(body)) == (404, {"error": {"message": "this server has no such path"}})
    assert guarded.reached == reached
    assert guarded.raw("POST", "/pause", good) == (200, b'{"got": 2}')


@pytest.mark.parametrize("path", ["/pause?mode=keep", "/update_weights", "/inference/v1/generate", "/sleep"])
def test_a_signed_request_counts_once(guarded: Guarded, client: Server, secret: Path, path: str) -> None:
    """Whoever listens on the network may send it again, at once or later."""
    heard = proof(atom_secret.read(secret), client.instance, path)
    first, _ = guarded.raw("POST", path, heard)
    assert first == (404 if path == "/sleep" else 200)
    reached = guarded.reached
    client.post("/resume")
    for _ in range(2):
        status, body = guarded.raw("POST", path, heard)
        assert (status, json.loads(body)) == (401, {"error": {"message": "this request was sent before"}})
    assert guarded.reached == [*reached, "POST /resume"]


def test_a_request_that_failed_is_signed_anew(
    guarded: Guarded, client: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt reaches the application; none is taken for a repetition of the one before."""
    monkeypatch.setattr(vllm_server, "RETRY_SECONDS", 0.01)
    reached = guarded.reached
    with pytest.raises(ServerLost, match="/pause: 500 the worker is busy"):
        client.post("/pause", {"busy": 1}, attempts=3)
    assert guarded.reached == [*reached, *["POST /pause"] * 3]


def test_a_websocket_is_refused(guarded: Guarded, client: Server) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), 30) as line:
        line.sendall(
            b"GET /pause HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert line.recv(100).split()[1] in (b"401", b"403")
    assert guarded.reached == ["GET /health"]


def test_a_server_that_started_anew_at_its_address_is_noticed(guarded: Guarded, client: Server, secret: Path) -> None:
    client.post("/pause")
    first = client.instance
    guarded.end()
    again = Guarded(guarded.log.parent, secret, guarded.port)
    try:
        while again.process.poll() is None:
            try:
                client.post("/resume", attempts=1)
            except ServerLost as error:
                if "is not signed" in str(error):
                    break
            time.sleep(0.1)
        assert again.reached == []
        client.wait(60)
        assert client.instance != first and client.post("/resume") == {"got": 2}
    finally:
        again.end()


def test_a_stranger_at_the_address_of_a_server_learns_nothing_and_is_not_believed(
    fakes: Any, sampler: VllmServer, secret: Path, tmp_path: Path
) -> None:
    """What was sent to it opens no other server, and its answers count for nothing."""
    one, two = fakes[0]
    one.key = bytes(32)
    with pytest.raises(ServerLost, match=r"its answer, 401, is not signed with .*secret: it started anew or with ano"):
        sampler.servers[0].post("/pause")
    one.read_body = lambda self: {}  # it takes anything
    with pytest.raises(ServerLost, match="its answer, 200, is not signed"):
        sampler.servers[0].problem()
    one.requests = []
    two.requests.clear()
    sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
    assert sampler.serving == [sampler.servers[1]] and [path for path, _ in one.requests] == ["/start_weight_update"]


def test_a_secret_is_a_file_that_only_its_user_reads(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    before = os.umask(0)
    try:
        atom_secret.make(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600 and len(atom_secret.read(path)) == 32
    first = path.read_text()
    atom_secret.make(path)
    assert path.read_text() == first and os.listdir(tmp_path) == ["secret"]
    for mode in (0o640, 0o604, 0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(UnusableSecret, match="must be a file of this user that nobody else may read"):
            atom_secret.read(path)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(UnusableSecret, match="must be a file of this user"):
            atom_secret.read(path)
        os.chown(path, 0, 0)
    for text in ("", first[:-1], "x" * 64):
        path.write_text(text)
        with pytest.raises(UnusableSecret, match="holds no secret; remove it"):
            atom_secret.read(path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(UnusableSecret, match="cannot be read"):
        atom_secret.read(path)


def test_signatures_bind_every_part(tmp_path: Path) -> None:
    key = bytes(range(32))
    signatures = {
        sign(key, "a", "b", "c"), sign(key, "a", "bc"), sign(key, "ab", "c"), sign(key, "a", "b", "c", ""),
        sign(bytes(32), "a", "b", "c"), sign(key, "b", "a", "c"),
    }  # fmt: skip
    assert len(signatures) == 6


def test_a_server_listens_where_it_is_needed(tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loopback beside training; on the address of the node in a job of its own. Never on all interfaces."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        vllm_server, "command", lambda python, folder, host, port, options: seen.append((host,)) or ["true"]
    )
    monkeypatch.setattr(vllm_server, "own_address", lambda: ("10.0.0.7", "n7"))
    monkeypatch.setattr(socket, "create_server", lambda place, **_: FakeListener(place))
    beside = Server.start("python", tmp_path, tmp_path / "a.log")
    apart = Server.start("python", tmp_path, tmp_path / "b.log", secret=secret)
    for server in (beside, apart):
        server.close()
    assert seen == [("127.0.0.1",), ("10.0.0.7",)]
    assert (beside.url, apart.url) == ("http://127.0.0.1:5", "http://n7:5")
    assert beside.secret == tmp_path / "a.secret" and beside.secret.stat().st_mode & 0o777 == 0o600


class FakeListener:
    def __init__(self, place: tuple[str, int]) -> None:
        assert place[0] in ("127.0.0.1", "10.0.0.7")

    def __enter__(self) -> FakeListener:
        return self

    def __exit__(self, *_: object) -> None: ...

    def getsockname(self) -> tuple[str, int]:
        return "", 5


def test_the_address_of_a_node_is_never_all_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolving(*addresses: str) -> Any:
        return lambda name, port, **_: [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    for addresses, expected in (
        (("10.0.0.7",), ("10.0.0.7", "n7")),
        (("127.0.1.1", "10.0.0.7"), ("10.0.0.7", "n7")),
        (("fe80::1%eth0", "fd00::7"), ("fd00::7", "n7")),
    ):
        monkeypatch.setattr(socket, "getaddrinfo", resolving(*addresses))
        assert environment.own_address() == expected
    monkeypatch.setattr(socket, "getaddrinfo", resolving("127.0.1.1"))
    address, host = environment.own_address()
    assert address == host and address not in ("0.0.0.0", "::", "127.0.1.1")  # noqa: S104


def test_what_a_stranger_writes_into_the_store_of_a_group_is_not_believed(
    sampler: VllmServer, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could say how many workers a server has, and with whom the ranks connect."""
    monkeypatch.setattr(weights, "GROUP_SECONDS", 30.0)
    sender = Broadcast(lambda by_turns: iter(TENSORS.items()), Ranks(0, 1, Layout(), 0, 1, True))
    sender.senders = [0]
    url = fakes[1][0]
    invitation = sender.invite(url, b"s" * 32)
    host, port = invitation["store"].rsplit(":", 1)
    assert listeners(int(port)) == {"127.0.0.1"}
    stranger = dist.TCPStore(host, int(port), is_master=False)
    for value in ("0", "1", "00" * 40):
        stranger.set("workers", value)
        with pytest.raises(RuntimeError, match="the entry workers of the group's store is not of a member"):
            SignedStore(sender.stores[url], sender.keys[url]).get("workers")
    connect(invitation["store"], "00" * 32, 30).set("workers", "1")  # signed with another key
    assert sender._join({url: (invitation["store"], sender.keys[url])}) == set() and not sender.groups
    invitation = sender.invite(url, b"s" * 32)
    connect(invitation["store"], sender.keys[url], 30).set("workers", "1")
    stranger = dist.TCPStore("127.0.0.1", int(invitation["store"].rsplit(":", 1)[1]), is_master=False)
    stranger.set("group/0/1", "an address of its own")
    assert sender._join({url: (invitation["store"], sender.keys[url])}) == set() and not sender.groups


def listeners(port: int) -> set[str]:
    """The local addresses on which somebody listens at a port."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address[9:], 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address[:8])[::-1]))
    for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == port:
            found.add("IPv6")
    return found


def test_the_settings_of_servers_that_others_start(tmp_path: Path) -> None:
    from stages.rl.config import Sampling

    for settings in ({"url": ["http://n:1"]}, {"secret": "s"}):
        with pytest.raises(ValueError, match="url and secret go together"):
            Sampling.model_validate({"kind": "vllm", "max_new_tokens": 4, **settings})
    atom_secret.make(tmp_path / "s")
    (tmp_path / "s").chmod(0o644)
    with pytest.raises(
        AtomError, match=r"must be a file of this user that nobody else may read; remove it; see sampling"
    ):
        Server("http://n:1", tmp_path / "s")
