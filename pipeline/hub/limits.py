"""Limits on every request and response of the Hub client, for any behavior of the server.

They are enforced in the network backend under httpx, so they cover a server that is silent, that sends one byte a
second, or that never stops, in headers, responses and files, on uploads and on downloads.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import AtomError
from pipeline.core.text import shown

PUBLIC_HUB = "https://huggingface.co"
PIECE = 16 << 10
"""Bytes of one write."""
FILES_PER_REQUEST, REQUESTS = 256, 4
"""The files of a commit that the client names in one request, and the requests to one address for so many files, with
repetitions."""


ETAG = re.compile('(W/)?"?[0-9A-Za-z][0-9A-Za-z._-]{0,127}"?')
"""The ETags of files that are accepted, of which the client makes names of files. Those of the Hub are digests."""
COMMIT = re.compile("[0-9a-f]{40}")


class HubLimit(AtomError):
    """The Hub exceeded a limit. Another attempt would not help."""


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes.

    connect: for a connection. silence: without a byte while reading. work: the same after a write, which a Hub may have
    to process. patience: without any answer, over all attempts. answer_seconds, answer_bytes: of an answer that is not
    a file. window, window_bytes: seconds in which at least so many bytes of a file must move. call_seconds: of a call,
    besides a second for each bytes_per_second of its files. attempts_per_address: requests for one address in a call.
    retry_after: the longest wait that a Hub may demand.
    """

    connect: float = 10.0
    silence: float = 10.0
    work: float = 60.0
    patience: float = 90.0
    answer_seconds: float = 60.0
    answer_bytes: int = 8 << 20
    window: float = 30.0
    window_bytes: int = 30_000
    call_seconds: float = 600.0
    bytes_per_second: int = 32_000
    attempts_per_address: int = 12
    retry_after: int = 60


LIMITS = Limits()
"""Read at each use, so that tests can be short."""


@dataclass
class _Call:
    """Counters of one call of the client. expected, files: bytes and number of the files that it transfers."""

    expected: int = 0
    files: int = 0
    started: float = field(default_factory=time.monotonic)
    last_heard: float = field(default_factory=time.monotonic)
    received: int = 0
    requests: Counter[str] = field(default_factory=Counter)


@dataclass
class _Exchange:
    """One request and its answer. is_file: whether the answer is a file of a repository."""

    is_file: bool = False
    reading: float | None = None
    received: int = 0
    window_started: float = field(default_factory=time.monotonic)
    window_bytes: int = 0


_call = _Call()
_expected = (0, 0)
_thread_state = threading.local()
_lock = threading.Lock()


@contextmanager
def transfer(expected: int, files: int = 0) -> Iterator[None]:
    """Context for calls that transfer files of that many bytes: they may take longer, and receive that much. files:
    the number of them, for calls that name them in several requests to one address."""
    global _expected
    _expected = expected, files
    try:
        yield
    finally:
        _expected = 0, 0


def begin_call(retried: bool = False) -> None:
    """Resets the counters; a retried call keeps its start and the time of the last answer."""
    global _call
    now = time.monotonic()
    _call = _Call(*_expected, _call.started if retried else now, _call.last_heard if retried else now)


def install(client: Any, endpoint: str) -> Any:
    """Puts the limits under an httpx client, and returns it. endpoint: the Hub's address."""

    def begin(request: Any) -> None:
        _begin_request(request, endpoint)

    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], begin], "response": [*hooks["response"], _begin_response]}
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:
            transport._pool._network_backend = _Backend(transport._pool._network_backend)
    return client


def _begin_request(request: Any, endpoint: str) -> None:
    url, limits, now = str(request.url), LIMITS, time.monotonic()
    _check_host(request, url, endpoint)
    with _lock:
        _call.requests[f"{request.method} {url}"] += 1
        attempts = _call.requests[f"{request.method} {url}"]
    if attempts > limits.attempts_per_address + REQUESTS * (_call.files // FILES_PER_REQUEST):
        raise HubLimit(f"was asked for {urlsplit(url).path} {attempts - 1} times without success")
    if now - _call.last_heard > limits.patience:
        raise HubLimit(f"does not answer: no answer within {limits.patience:g} s")
    _check_duration(now)
    silence = limits.silence if request.method in ("GET", "HEAD") else limits.work
    request.extensions["timeout"] = {
        "connect": limits.connect, "read": silence, "write": limits.work, "pool": limits.patience
    }  # fmt: skip
    request.headers["accept-encoding"] = "identity"  # compressed data can expand to any size
    is_api_answer = request.method != "GET" or urlsplit(url).path.startswith(f"{urlsplit(endpoint).path}/api/")
    _thread_state.exchange = _Exchange(is_file=not is_api_answer)


def _check_duration(now: float) -> None:
    """Raises HubLimit if a call takes longer than its files allow."""
    if now - _call.started > LIMITS.call_seconds + _call.expected / LIMITS.bytes_per_second:
        raise HubLimit(f"is too slow: not finished after {now - _call.started:.0f} s")


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


def _begin_response(response: Any) -> None:
    if response.status_code >= 400:
        _exchange().is_file = False
    if not _exchange().is_file:  # a file counts by its bytes
        _call.last_heard = time.monotonic()
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise HubLimit("sends a compressed answer, which was not requested")
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isdigit() and int(retry_after) > LIMITS.retry_after:
        response.headers["retry-after"] = str(LIMITS.retry_after)
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


def _exchange() -> _Exchange:
    """The current exchange of this thread."""
    if not hasattr(_thread_state, "exchange"):
        _thread_state.exchange = _Exchange()
    exchange: _Exchange = _thread_state.exchange
    return exchange


def _count_window(exchange: _Exchange, count: int) -> None:
    """Raises HubLimit if too few bytes moved within a window of time, or the call takes too long."""
    now, exchange.window_bytes = time.monotonic(), exchange.window_bytes + count
    _check_duration(now)
    if now - exchange.window_started > LIMITS.window:
        if exchange.window_bytes < LIMITS.window_bytes:
            raise HubLimit(f"transfers only {exchange.window_bytes} bytes in {now - exchange.window_started:.0f} s")
        exchange.window_started, exchange.window_bytes = now, 0


def _count_received(exchange: _Exchange, count: int) -> None:
    """Raises HubLimit if an answer has too many bytes, or files have more than was announced."""
    exchange.received += count
    if not exchange.is_file:
        if exchange.received > LIMITS.answer_bytes:
            raise HubLimit(f"answers with more than {LIMITS.answer_bytes} bytes where a short answer was expected")
        return
    if exchange.reading is not None and count and exchange.received > count:  # the first bytes are its header
        _call.last_heard = time.monotonic()
    with _lock:
        _call.received += count
    if _call.received > 2 * _call.expected + LIMITS.answer_bytes:  # interrupted transfers are repeated
        raise HubLimit(f"sends more than the {_call.expected} bytes that were announced for its files")


class _Backend:
    """httpcore's network backend, with limits."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
        return _Stream(self.inner.connect_tcp(*arguments, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Stream:
    """A connection, with limits."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        exchange, now = _exchange(), time.monotonic()
        if exchange.reading is None:
            exchange.reading = exchange.window_started = now
            exchange.window_bytes = 0
        read_timeout = LIMITS.work if timeout is None else timeout
        if not exchange.is_file:
            answer_seconds_left = exchange.reading + LIMITS.answer_seconds - now
            if answer_seconds_left <= 0:
                raise HubLimit(f"does not finish its answer within {LIMITS.answer_seconds:g} s")
            read_timeout = min(read_timeout, answer_seconds_left)
        data: bytes = self.inner.read(max_bytes, read_timeout)
        _count_received(exchange, len(data))
        if exchange.is_file:
            _count_window(exchange, len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        exchange, view = _exchange(), memoryview(buffer)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self.inner.write(piece, LIMITS.work if timeout is None else timeout)
            if len(piece) == PIECE:
                _call.last_heard = time.monotonic()
            _count_window(exchange, len(piece))

    def start_tls(self, *arguments: Any, **options: Any) -> Any:
        # in a handshake, the timeout is for each byte
        timer = threading.Timer(LIMITS.connect, self._shut_down)
        timer.daemon = True
        timer.start()
        try:
            return _Stream(self.inner.start_tls(*arguments, **options))
        finally:
            timer.cancel()

    def _shut_down(self) -> None:
        with suppress(OSError):  # it may be closed already
            self.inner.get_extra_info("socket").shutdown(2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
