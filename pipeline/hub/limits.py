"""Limits on every request and answer of the Hub client, for any behavior of the server.

The client's own time-outs end a server that is silent. They do not end one that sends a byte a second, or that never
stops sending. So the connections of the client are counted, and a thread beside each call ends them if it takes too
long.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

from pipeline.core.errors import AtomError
from pipeline.core.text import shown

PUBLIC_HUB = "https://huggingface.co"
# The ETags of files that are accepted, of which the client makes names of files. Those of the Hub are digests.
ETAG = re.compile('(W/)?"?[0-9A-Za-z][0-9A-Za-z._-]{0,127}"?')
COMMIT = re.compile("[0-9a-f]{40}")


class HubLimit(AtomError):
    """The Hub exceeded a limit. Another attempt would not help."""


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes.

    Attributes:
        connect: Seconds for a connection.
        silence: Seconds without a byte while reading.
        work: Seconds without a byte after a write, which a Hub may have to process.
        window: Seconds in which a call must get an answer, or move `window_bytes` of files. Longer than `work` and
            `retry_after` together.
        window_bytes: Bytes for a window without an answer.
        call_seconds: Seconds for a call with all of its attempts, besides one for each `bytes_per_second` of its files.
        bytes_per_second: The least speed of a whole transfer.
        answer_bytes: Bytes that a call may receive, besides twice its files.
        retry_after: The longest wait that a Hub may demand.
    """

    connect: float = 10.0
    silence: float = 10.0
    work: float = 60.0
    window: float = 150.0
    window_bytes: int = 150_000
    call_seconds: float = 600.0
    bytes_per_second: int = 32_000
    answer_bytes: int = 128 << 20
    retry_after: int = 60


# Read at each use, so that tests can be short.
LIMITS = Limits()


@dataclass
class _Call:
    """Counters of one call of the client.

    Attributes:
        expected: Bytes of the files that it transfers.
        received: Bytes that it received.
        moved: Bytes that it received or sent.
        answers: Answers that are not files.
        problem: The limit that it exceeded.
    """

    expected: int = 0
    started: float = field(default_factory=time.monotonic)
    received: int = 0
    moved: int = 0
    answers: int = 0
    problem: str = ""


# The present call, and the bytes of its files. All threads of the call share them, so a process makes one call at a
# time.
_call = _Call()
_expected = 0
_streams: WeakSet[_Stream] = WeakSet()
# The connections that wait for the Hub at the moment.
_waiting: set[_Stream] = set()


@contextmanager
def transfer(expected: int) -> Iterator[None]:
    """Allows the calls of the block to transfer files of that many bytes.

    They may take longer, and receive that much.
    """
    global _expected
    _expected = expected
    try:
        yield
    finally:
        _expected = 0


@contextmanager
def limited() -> Iterator[None]:
    """Applies the limits to one call of the client, with all of its attempts. Raises HubLimit if it takes too long."""
    global _call
    call = _call = _Call(_expected)
    stop = threading.Event()
    threading.Thread(target=_watch, args=(call, stop), name="hub", daemon=True).start()
    try:
        yield
    except Exception as error:
        if call.problem and not isinstance(error, HubLimit):
            raise HubLimit(call.problem) from None
        raise
    finally:
        stop.set()


def _watch(call: _Call, stop: threading.Event) -> None:
    """Ends the connections of a call that makes no progress, or takes longer than its files allow."""
    answers = moved = 0
    while not stop.wait(LIMITS.window):
        seconds = time.monotonic() - call.started
        if _waiting and call.answers == answers and call.moved - moved < LIMITS.window_bytes:
            call.problem = f"does not answer in time: {call.moved - moved} bytes within {LIMITS.window:g} s"
        elif seconds > LIMITS.call_seconds + call.expected / LIMITS.bytes_per_second:
            call.problem = f"is too slow: not finished after {seconds:.0f} s"
        answers, moved = call.answers, call.moved
        if call.problem:
            for stream in list(_streams):
                with suppress(OSError):  # it may be closed already
                    stream.handle.shutdown(socket.SHUT_RDWR)


def install(client: Any, endpoint: str) -> Any:
    """Puts the limits under an httpx client, and returns it.

    Args:
        client: The client. It is changed.
        endpoint: The Hub's address.
    """

    def begin(request: Any) -> None:
        _begin_request(request, endpoint)

    def answered(response: Any) -> None:
        _begin_response(response, endpoint)

    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], begin], "response": [*hooks["response"], answered]}
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:
            transport._pool._network_backend = _Backend(transport._pool._network_backend)
    return client


def _begin_request(request: Any, endpoint: str) -> None:
    if _call.problem:
        raise HubLimit(_call.problem)
    _check_host(request, str(request.url), endpoint)
    silence = LIMITS.silence if request.method in ("GET", "HEAD") else LIMITS.work
    times = {"connect": LIMITS.connect, "read": silence, "write": LIMITS.work, "pool": LIMITS.call_seconds}
    request.extensions["timeout"] = times
    request.headers["accept-encoding"] = "identity"  # compressed data can expand to any size


def _check_host(request: Any, url: str, endpoint: str) -> None:
    """Raises HubLimit for a host that is not the Hub's. Removes the token unless the address is the Hub's own."""
    target, hub = urlsplit(url), urlsplit(endpoint)
    if _origin(target) == _origin(hub):
        return
    encrypted = (hub.scheme, target.scheme) == ("http", "https") and (target.port or 443) == 443
    if target.hostname == hub.hostname and encrypted:
        return
    host = target.hostname or ""
    storage = (".hf.co", ".huggingface.co") + ((".amazonaws.com",) if endpoint == PUBLIC_HUB else ())
    if target.scheme != "https" or not f".{host}".endswith(storage):
        raise HubLimit(f"redirects to another host, {host}, which is not followed")
    request.headers.pop("authorization", None)


def _origin(parts: Any) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _begin_response(response: Any, endpoint: str) -> None:
    is_api = str(response.request.url).startswith(f"{endpoint}/api/")
    if is_api or response.request.method != "GET" or response.status_code >= 400:
        _call.answers += 1  # a file counts by its bytes
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise HubLimit("sends a compressed answer, which was not requested")
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isdigit() and int(retry_after) > LIMITS.retry_after:
        response.headers["retry-after"] = str(LIMITS.retry_after)
    # The client would also wait by this header, for which there is no limit here.
    response.headers.pop("ratelimit", None)
    _check_paths(response)


def _check_paths(response: Any) -> None:
    """Raises HubLimit for a header that would lead the client out of its folder: it joins these headers to paths.

    The client reads the ETag of a file from the answers to HEAD. It has no use for others, so they are removed.
    """
    for name, pattern in (("ETag", ETAG), ("X-Linked-ETag", ETAG), ("X-Repo-Commit", COMMIT)):
        value = response.headers.get(name)
        if value is None or pattern.fullmatch(value):
            continue
        is_of_file = response.request.method == "HEAD" and response.status_code < 400
        if is_of_file or pattern is COMMIT:
            raise HubLimit(f"sends the {name} {shown(value)}, which names no version of a file")
        del response.headers[name]
    response.headers.pop("content-disposition", None)


class _Backend:
    """httpcore's network backend, whose connections are counted."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
        inner = self.inner.connect_tcp(*arguments, **options)
        # The duplicate stays usable when TLS takes over the socket.
        return _Stream(inner, inner.get_extra_info("socket").dup())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Stream:
    """A connection, and a handle by which another thread can end it, also within a handshake of TLS."""

    def __init__(self, inner: Any, handle: socket.socket) -> None:
        self.inner, self.handle = inner, handle
        _streams.add(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        _waiting.add(self)
        try:
            data: bytes = self.inner.read(max_bytes, timeout)
        finally:
            _waiting.discard(self)
        _call.received += len(data)
        _call.moved += len(data)
        most = LIMITS.answer_bytes + 2 * _call.expected  # interrupted transfers are repeated
        if _call.received > most:
            raise HubLimit(f"sends more than {most} bytes, and its files have {_call.expected}")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        _waiting.add(self)
        try:
            self.inner.write(buffer, timeout)
        finally:
            _waiting.discard(self)
        _call.moved += len(buffer)

    def start_tls(self, *arguments: Any, **options: Any) -> Any:
        _waiting.add(self)
        try:
            return _Stream(self.inner.start_tls(*arguments, **options), self.handle)
        finally:
            _waiting.discard(self)

    def close(self) -> None:
        self.handle.close()
        self.inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
