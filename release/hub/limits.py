"""Limits on everything that the Hub's client asks and is answered, whatever the other side does.

They are held where bytes are read and written (the network backend under httpx), so a server that is silent, that sends
one byte a second, or that never stops is met everywhere: in headers, answers and files, on uploads as on downloads.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import AtomError

PUBLIC_HUB = "https://huggingface.co"
PIECE = 16 << 10
"""Bytes that are written at once."""


class HubLimit(AtomError):
    """The Hub went beyond a limit. PromptPool again would not help."""


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes. silence: without a byte, where something is read; work: the same, where something is written,
    which a Hub may have to work on. patience: without any answer, over all attempts."""

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
    """What one call of the client may do. expected: bytes that are to be sent or received as files."""

    expected: int = 0
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
_expected = 0
_thread_state = threading.local()
_lock = threading.Lock()


@contextmanager
def transfer(expected: int) -> Iterator[None]:
    """While files of so many bytes are sent or received: calls may take longer, and receive that much."""
    global _expected
    _expected = expected
    try:
        yield
    finally:
        _expected = 0


def begin_call(retried: bool = False) -> None:
    """Counts from zero, but for how long it takes and nothing was heard if the call is made again."""
    global _call
    now = time.monotonic()
    _call = _Call(_expected, _call.started if retried else now, _call.last_heard if retried else now)


def install(client: Any, endpoint: str) -> Any:
    """Puts the limits under an httpx client; returns it."""

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
    if attempts > limits.attempts_per_address:
        raise HubLimit(f"was asked for {urlsplit(url).path} {attempts - 1} times in vain")
    if now - _call.last_heard > limits.patience:
        raise HubLimit(f"does not answer: nothing came within {limits.patience:g} s")
    _check_duration(now)
    silence = limits.silence if request.method in ("GET", "HEAD") else limits.work
    request.extensions["timeout"] = {
        "connect": limits.connect, "read": silence, "write": limits.work, "pool": limits.patience
    }  # fmt: skip
    request.headers["accept-encoding"] = "identity"  # what is packed may unpack to anything
    is_api_answer = request.method != "GET" or urlsplit(url).path.startswith(f"{urlsplit(endpoint).path}/api/")
    _thread_state.exchange = _Exchange(is_file=not is_api_answer)


def _check_duration(now: float) -> None:
    """Raises HubLimit if a call takes longer than files of its size may."""
    if now - _call.started > LIMITS.call_seconds + _call.expected / LIMITS.bytes_per_second:
        raise HubLimit(f"is too slow: this took {now - _call.started:.0f} s without an end")


def _check_host(request: Any, url: str, endpoint: str) -> None:
    """Raises HubLimit for a host that is not the Hub's; a token goes to the Hub's own address only."""
    target, hub = urlsplit(url), urlsplit(endpoint)
    if _origin(target) == _origin(hub):
        return
    encrypted = (hub.scheme, target.scheme) == ("http", "https") and (target.port or 443) == 443
    if target.hostname == hub.hostname and encrypted:
        return
    host = target.hostname or ""
    storage = (".hf.co", ".huggingface.co") + ((".amazonaws.com",) if endpoint == PUBLIC_HUB else ())
    if target.scheme != "https" or not f".{host}".endswith(storage):
        raise HubLimit(f"sends us to another host, {host}, where nothing is asked for and no token goes")
    request.headers.pop("authorization", None)


def _origin(parts: Any) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _begin_response(response: Any) -> None:
    if response.status_code >= 400:
        _exchange().is_file = False
    if not _exchange().is_file:  # of a file its bytes count
        _call.last_heard = time.monotonic()
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise HubLimit("sends a packed answer, which was not asked for")
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isdigit() and int(retry_after) > LIMITS.retry_after:
        response.headers["retry-after"] = str(LIMITS.retry_after)
    response.headers.pop("ratelimit", None)


def _exchange() -> _Exchange:
    """Of this thread."""
    if not hasattr(_thread_state, "exchange"):
        _thread_state.exchange = _Exchange()
    exchange: _Exchange = _thread_state.exchange
    return exchange


def _count_window(exchange: _Exchange, count: int) -> None:
    """Raises HubLimit if next to nothing moved within a window of time, or all takes too long."""
    now, exchange.window_bytes = time.monotonic(), exchange.window_bytes + count
    _check_duration(now)
    if now - exchange.window_started > LIMITS.window:
        if exchange.window_bytes < LIMITS.window_bytes:
            raise HubLimit(f"moves {exchange.window_bytes} bytes in {now - exchange.window_started:.0f} s")
        exchange.window_started, exchange.window_bytes = now, 0


def _count_received(exchange: _Exchange, count: int) -> None:
    """Raises HubLimit if an answer has too many bytes, or files more than they were said to have."""
    exchange.received += count
    if not exchange.is_file:
        if exchange.received > LIMITS.answer_bytes:
            raise HubLimit(f"answers with more than {LIMITS.answer_bytes} bytes where a short answer was asked for")
        return
    if exchange.reading is not None and count and exchange.received > count:  # what came first was its head
        _call.last_heard = time.monotonic()
    with _lock:
        _call.received += count
    if _call.received > 2 * _call.expected + LIMITS.answer_bytes:  # broken transfers are begun again
        raise HubLimit(f"sends more than the {_call.expected} bytes that its files were said to have")


class _Backend:
    """The network as httpcore sees it, with limits."""

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
                raise HubLimit(f"does not end its answer within {LIMITS.answer_seconds:g} s")
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
        # a handshake waits for each of its bytes anew
        timer = threading.Timer(LIMITS.connect, self._shut_down)
        timer.daemon = True
        timer.start()
        try:
            return _Stream(self.inner.start_tls(*arguments, **options))
        finally:
            timer.cancel()

    def _shut_down(self) -> None:
        with suppress(OSError):  # it may have ended just now
            self.inner.get_extra_info("socket").shutdown(2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
