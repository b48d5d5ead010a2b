"""The Hub's client against servers that misbehave, over real sockets: one sentence each, in bounded time.

All clients run at once, each in a process of its own, with limits of seconds instead of a minute.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.core.errors import AtomError
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import SOAK

SHA = "a" * 40
TOKEN = "hf_" + "s" * 34
CLIENT = """
import sys
from pipeline.core.errors import AtomError
from pipeline.hub import limits
from release.{module} import {call}
SHA = "a" * 40
limits.LIMITS = limits.Limits(
    connect=20, silence=5, work=5, window=7, window_bytes=10_000, answer_bytes=8 << 20, retry_after=1,
    call_seconds={seconds})
try:
    {run}
    print("no error")
except AtomError as error:
    print(type(error).__name__, error.exit_code, str(error))
"""
VERIFY = {"module": "audit.verify", "call": "verify", "run": "verify('a/b')", "seconds": "300"}
PAGES = {**VERIFY, "seconds": "5"}
SLOW_NAME = "slow.json"
SLOW = {**VERIFY, "seconds": "10"}
UPLOAD = {
    "module": "hub.upload",
    "call": "Destination, Difference, Journal, Path, RemoteRepository, Repository",
    "run": "folder = Path(sys.argv[1]); to = Repository('', '', 'model'), RemoteRepository('a/b', 'model'); "
    "Destination(folder, *to, 'v1', Journal(folder / 'j'))._commit('main', Difference(['x.safetensors'], []), 'm', SHA)",
    "seconds": "300",
}
Connection = socket.socket


def request(connection: Connection) -> tuple[str, str, str]:
    """Method, path and all that was received of a request. Raises OSError at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            raise OSError
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    text = head.decode("latin-1")
    sizes = [int(line.split(":")[1]) for line in text.splitlines() if line.lower().startswith("content-length:")]
    while sizes and len(body) < sizes[0] and len(body) < 100_000:
        body += connection.recv(65536)
    method, path = text.split()[:2]
    return method, path.split("?")[0], text


def answer(connection: Connection, body: bytes = b"", status: str = "200 OK", headers: str = "") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)


def silent(connection: Connection) -> None:
    time.sleep(300)


def drip(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.2)


def steady(connection: Connection) -> None:
    """As many bytes as each window asks for, and no more."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n")
    for _ in range(200_000 // 2000):
        connection.sendall(bytes(2000))
        time.sleep(0.25)


def drip_headers(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.2)


def endless(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def wrong_length(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}")
    raise OSError


def garbage(connection: Connection) -> None:
    connection.sendall(b"\x1b[2J\0\xff no HTTP\r\n\r\n")
    raise OSError


def closing(connection: Connection) -> None:
    raise OSError


def respond(body: bytes, status: str = "200 OK", headers: str = "") -> Callable[[Connection], None]:
    return lambda connection: answer(connection, body, status, headers)


def always(act: Callable[[Connection], None]) -> Callable[[Connection], None]:
    """A server that does one thing whatever it is asked."""

    def serve(connection: Connection) -> None:
        while True:
            request(connection)
            act(connection)

    return serve


def circles(connection: Connection) -> None:
    while True:
        answer(connection, status="302 Found", headers=f"Location: {request(connection)[1]}?again\r\n")


def repository(
    act: Callable[[Connection], None], name: str = "x.json", size: object = 1000, next_page: bool = False
) -> Callable[[Connection], None]:
    """A Hub with one repository of one file; act: what it does when the file is asked for."""

    def serve(connection: Connection) -> None:
        while True:
            method, path, head = request(connection)
            if "/tree/" in path:
                rows = [{"type": "file", "path": name, "size": size, "oid": "b" * 40}]
                host = next(line for line in head.splitlines() if line.lower().startswith("host:")).split()[1]
                link = f'Link: <http://{host}{path}?cursor={time.time()}>; rel="next"\r\n' if next_page else ""
                answer(connection, json.dumps(rows).encode(), headers=link)
            elif path.startswith("/api/"):
                body = {"id": "a/b", "sha": SHA, "private": False, "siblings": [{"rfilename": name}], "tags": []}
                answer(connection, json.dumps(body).encode())
            elif method == "HEAD":
                length = size if name == SLOW_NAME else 1000
                head = (
                    f'HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nX-Repo-Commit: {SHA}\r\nETag: "{"b" * 40}"\r\n\r\n'
                )
                connection.sendall(head.encode())
            else:
                act(connection)

    return serve


def receiving(act: Callable[[Connection], None], href: str = "") -> Callable[[Connection], None]:
    """A Hub that takes a file into LFS; act: what it does when the bytes come."""

    def serve(connection: Connection) -> None:
        while True:
            method, path, head = request(connection)
            host = next(line for line in head.splitlines() if line.lower().startswith("host:")).split()[1]
            if path.endswith("/preupload/main"):
                row = {"path": "x.safetensors", "uploadMode": "lfs", "shouldIgnore": False, "oid": None}
                answer(connection, json.dumps({"files": [row]}).encode())
            elif path.endswith("/info/lfs/objects/batch"):
                target = {"href": href or f"http://{host}/put"}
                row = {"oid": OID, "size": 1000, "actions": {"upload": target}}
                answer(connection, json.dumps({"transfer": "basic", "objects": [row]}).encode())
            elif method == "PUT":
                act(connection)
            else:
                answer(connection, b"{}")

    return serve


OID = "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"  # of a thousand zeros
ELSEWHERE = respond(b"", "302 Found", "Location: http://127.0.0.9:1/x\r\n")
CASES: dict[str, tuple[dict[str, str], Callable[[Connection], None], str]] = {
    "silent": (VERIFY, always(silent), "does not answer"),
    "dripping": (VERIFY, always(drip), "does not answer in time: "),
    "dripping headers": (VERIFY, always(drip_headers), "does not answer in time: "),
    "redirect to another host": (VERIFY, always(ELSEWHERE), "redirects to another host, 127.0.0.9"),
    "redirect in circles": (VERIFY, circles, "redirects in a circle"),
    "a list for an object": (VERIFY, always(respond(b"[1, 2]")), "sends a malformed answer (TypeError"),
    "other fields": (VERIFY, always(respond(b'{"sha": 5, "siblings": 7}')), "sends a malformed answer (KeyError: 'id')"),
    "deep JSON": (VERIFY, always(respond(b"[" * 100_000)), "sends a malformed answer (RecursionError"),
    "an endless answer": (VERIFY, always(endless), "sends more than 8388608 bytes"),
    "a cut answer": (VERIFY, always(wrong_length), "interrupts or corrupts its answer"),
    "a packed answer": (VERIFY, always(respond(gzip.compress(bytes(9_000_000)), headers="Content-Encoding: gzip\r\n")), "sends a compressed answer"),
    "no HTTP": (VERIFY, always(garbage), "interrupts or corrupts its answer"),
    "a closed connection": (VERIFY, always(closing), "interrupts or corrupts its answer"),
    "a very long wait": (VERIFY, always(respond(b"{}", "429 Busy", "Retry-After: 1000000\r\n")), "answers 429"),
    "a silent file": (VERIFY, repository(silent), "does not answer"),
    "a dripping file": (VERIFY, repository(drip), "does not answer in time: "),
    "a slow file": (SLOW, repository(steady, SLOW_NAME, 200_000), "is too slow"),
    "an endless file": (VERIFY, repository(endless), "sends more than 8390608 bytes, and its files have 1000"),
    "a cut file": (VERIFY, repository(wrong_length), "interrupts or corrupts its answer"),
    "a short file": (VERIFY, repository(respond(b"abc")), "sends other bytes than it announced"),
    "a file elsewhere": (VERIFY, repository(ELSEWHERE), "redirects to another host, 127.0.0.9"),
    "pages without end": (PAGES, repository(respond(bytes(1000)), next_page=True), "is too slow"),
    "a path that leads out": (VERIFY, repository(respond(b""), name="../../out"), "has a file ../../out, which no release has"),
    "a path into the cache": (VERIFY, repository(respond(b""), name=".cache/x.py"), "has a file .cache/x.py, which no release has"),
    "a name that clears the screen": (VERIFY, repository(respond(b""), name="\x1b[2Jx"), "has a file \\x1b[2Jx, which no release has"),
    "more than the disk has": (VERIFY, repository(respond(b""), size=10**17), "bytes, and"),
    "a size that is none": (VERIFY, repository(respond(b""), size="many"), "sends a malformed answer (ValueError"),
    "an upload that is not answered": (UPLOAD, receiving(silent), "does not answer"),
    "an upload elsewhere": (UPLOAD, receiving(respond(b"{}"), href="http://127.0.0.9:1/x"), "redirects to another host, 127.0.0.9"),
}  # fmt: skip


REPEATED = {
    "dripping", "redirect in circles", "other fields", "a cut answer", "no HTTP", "a closed connection", "a cut file",
    "a file elsewhere", "a path into the cache", "a name that clears the screen", "a size that is none",
    "an upload elsewhere",
}  # fmt: skip
"""What other cases resemble; `make soak PART=release` runs these, too. Each is a process that imports the client."""
if not SOAK:
    CASES = {name: case for name, case in CASES.items() if name not in REPEATED}


def start_server(serve: Callable[[Connection], None]) -> tuple[socket.socket, str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def run(connection: Connection) -> None:
        with connection:
            try:
                serve(connection)
            except OSError:
                return  # the client has gone, or is to be left

    def loop() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the end of the tests
            threading.Thread(target=run, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    folder = tmp_path_factory.mktemp("clients")
    (folder / "x.safetensors").write_bytes(bytes(1000))
    processes, listeners = {}, []
    for number, (name, (client, serve, _)) in enumerate(CASES.items()):
        listener, endpoint = start_server(serve)
        listeners.append(listener)
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / f"hf-{number}")}
        command = [sys.executable, "-c", CLIENT.format(**client), str(folder)]
        processes[name] = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    yield processes
    for process in processes.values():
        process.kill()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_and_an_end(name: str, clients: dict[str, subprocess.Popen[str]]) -> None:
    out, err = clients[name].communicate(timeout=240)
    line = out.strip()
    assert CASES[name][2] in line and "\n" not in line and line.isprintable(), (line, err[-2000:])
    assert (
        line.split()[:2] in (["AtomError", "2"], ["MachineError", "2"], ["CheckFailed", "1"]) and TOKEN not in out + err
    )


def test_mistakes_of_ours_are_not_the_hubs() -> None:
    """Nor are calls that the client does not know; what the client raises of an answer is."""
    from pipeline.hub.client import RetryingClient, parsing, translate_errors

    class Client:
        def info(self, repo: str) -> object:
            raise KeyError("id")

    for mistake in (
        lambda: {}["ours"],
        lambda: [].ours,
        lambda: RetryingClient(Client()).info(),
        lambda: RetryingClient(Client()).none,
    ):
        with pytest.raises((KeyError, AttributeError, TypeError)), translate_errors("asking"):
            mistake()
    with (
        pytest.raises(AtomError, match=r"asking: .* sends a malformed answer \(KeyError: 'id'\)"),
        translate_errors("asking"),
    ):
        RetryingClient(Client()).info("a/b")
    with pytest.raises(AtomError, match="sends a malformed answer"), translate_errors("asking"), parsing():
        int("many")


def test_the_token_goes_to_the_hub_alone() -> None:
    from pipeline.hub import client, limits
    from pipeline.hub.limits import HubLimit

    def check(url: str, endpoint: str) -> bool:
        request = client._http().Request("GET", url, headers={"authorization": f"Bearer {TOKEN}"})
        limits._begin_request(request, endpoint)
        return "authorization" in request.headers

    assert check("https://huggingface.co/a", "https://huggingface.co")
    assert check("http://hub.example:8080/a", "http://hub.example:8080")
    assert check("https://hub.example/a", "http://hub.example:8080")
    assert not check("https://cas-bridge.xethub.hf.co/x", "https://huggingface.co")
    assert not check("https://s3.amazonaws.com/x", "https://huggingface.co")
    for url, endpoint in (
        ("https://evilhf.co/x", "https://huggingface.co"),
        ("http://cdn-lfs.hf.co/x", "https://huggingface.co"),
        ("https://huggingface.co.evil.example/x", "https://huggingface.co"),
        ("https://s3.amazonaws.com/x", "http://hub.example"),
        ("https://hub.example:8443/a", "http://hub.example:8080"),
        ("https://hub.example:8080/a", "http://hub.example:8080"),
        ("http://hub.example:9090/a", "http://hub.example:8080"),
        ("http://user@evil.example/a", "http://hub.example:8080"),
    ):
        with pytest.raises(HubLimit, match="redirects to another host"):
            check(url, endpoint)
