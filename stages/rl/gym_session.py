"""Sessions with a resources server of NeMo Gym over HTTP, for its verifier and for the tools of its environment. NeMo
Gym itself is not needed.

A server keeps the state of an environment by a session cookie: `/seed_session` begins it with the row of a task, each
tool is a path, and `/verify` scores. A session here lives for one request: it makes the earlier calls of the answer
again. So an answer that is drawn in one process may be scored in another, and a call whose reply is lost has no effect
on the next session.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from stages.tasks.rows import Row

ATTEMPTS = 5
BACK_OFF = 1.0  # seconds before the second attempt; doubled for each further one
PARALLEL = 16
MOST_BYTES = 1 << 24
"""Of a reply, what is read."""
CHUNK_BYTES = 1 << 16
BUSY = (429, 502, 503, 504)
"""The statuses of a server that may answer later."""

T = TypeVar("T")


class Unanswered(Exception):
    """A server did not do what it was asked for, in words. again: whether it may the next time."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


class Session:
    """Requests with the cookies of one session, past any proxy of the environment."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
        self.opener = urllib.request.build_opener(*handlers)

    def post(self, path: str, body: Any) -> bytes:
        """The reply. Raises Unanswered for any other status than 2xx."""
        status, payload = self._send(path, body)
        if status >= 400:
            reason = f"{self.url}/{path} answered {status}: {payload[:500].decode(errors='replace')}"
            raise Unanswered(reason, status == 429 or status >= 500)
        return payload

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[int, str]:
        """The status and the reply of a tool, which may refuse the arguments. Raises Unanswered if the server cannot be
        reached, or is busy."""
        status, payload = self._send(name, arguments)
        if status in BUSY:
            raise Unanswered(f"{self.url}/{name} answered {status}")
        return status, payload.decode(errors="replace")

    def begin(self, row: Row, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[int, str]]:
        """Begins the session of a task, and makes calls. Returns their statuses and replies."""
        self.post("seed_session", row)
        return [self.call(name, arguments) for name, arguments in calls]

    def _send(self, path: str, body: Any) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        try:
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    return reply.status, self._read(reply)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, self._read(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error) or type(error).__name__
            raise Unanswered(f"{self.url}/{path} did not answer ({reason})") from None

    def _read(self, reply: Any) -> bytes:
        """The first MOST_BYTES of a reply. Raises TimeoutError if they take longer than `timeout`, since a server that
        sends a byte now and then would hold the phase for ever."""
        end, payload = time.monotonic() + self.timeout, bytearray()
        while len(payload) < MOST_BYTES and (piece := reply.read1(min(CHUNK_BYTES, MOST_BYTES - len(payload)))):
            payload += piece
            if time.monotonic() > end:
                raise TimeoutError(f"its reply took longer than {self.timeout:g} s")
        return bytes(payload)


def attempt(url: str, timeout: float, work: Callable[[Session], T]) -> T:
    """The result of work in a session, with a new one for each of ATTEMPTS. Raises Unanswered."""
    reason = ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(BACK_OFF * 2 ** (number - 1))
        try:
            return work(Session(url, timeout))
        except Unanswered as error:
            if not error.again:
                raise
            reason = str(error)
    raise Unanswered(f"{reason}, {ATTEMPTS} times", again=False)
