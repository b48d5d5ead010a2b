"""Tool `nemo-gym`: the tools of an environment of NeMo Gym, and sessions with its resources server over HTTP.

NeMo Gym itself is not needed. A task lists the tools in `responses_create_params.tools`. A server keeps the state of an
environment by a session cookie: `/seed_session` begins it with the row of a task, each tool is a path, and `/verify`
scores, for the verifier of the same name. A session here lives for one request: it makes the earlier calls of the
answer again. So an answer that is drawn in one process may be scored in another, and a call whose reply is lost has no
effect on the next session.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

from pipeline.core.bounds import Line, LongLine, Range
from pipeline.core.stage import operational
from stages.rl.protocols import Call, Result, Tool, ToolFailed
from stages.tasks import Row

# Times that a request is tried.
ATTEMPTS = 5
BACK_OFF = 1.0  # seconds before the second attempt; doubled for each further one
# Sessions with a server at once.
PARALLEL = 16
# Bytes of a reply that are read.
MOST_BYTES = 1 << 24
CHUNK_BYTES = 1 << 16
# The statuses of a server that may answer later.
BUSY = (429, 502, 503, 504)

T = TypeVar("T")
TOOL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
# Paths of a server that are no tools.
RESERVED = ("verify", "seed_session", "close_session", "aggregate_metrics", "mcp")


class Unanswered(Exception):
    """A server did not do what it was asked for, in words.

    Args:
        reason: The sentence.
        again: True if it may the next time.
    """

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


class Session:
    """Requests with the cookies of one session, past any proxy of the environment."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        # Past any proxy of the environment, as for vLLM servers.
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
        self.opener = urllib.request.build_opener(*handlers)

    def post(self, path: str, body: Any) -> bytes:
        """Returns the reply.

        Raises:
            Unanswered: The status is another one than 2xx.
        """
        status, payload = self._send(path, body)
        if status >= 400:
            reason = f"{self.url}/{path} answered {status}: {payload[:500].decode(errors='replace')}"
            raise Unanswered(reason, status == 429 or status >= 500)
        return payload

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[int, str]:
        """Returns the status and the reply of a tool, which may refuse the arguments.

        Raises:
            Unanswered: The server cannot be reached, or is busy.
        """
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
        """Returns the first MOST_BYTES of a reply.

        Raises:
            TimeoutError: They take longer than `timeout`, since a server that sends a byte now and then would hold the
                phase for ever.
        """
        # The timeout of urllib is of each read alone.
        end, payload = time.monotonic() + self.timeout, bytearray()
        while len(payload) < MOST_BYTES and (piece := reply.read1(min(CHUNK_BYTES, MOST_BYTES - len(payload)))):
            payload += piece
            if time.monotonic() > end:
                raise TimeoutError(f"its reply took longer than {self.timeout:g} s")
        return bytes(payload)


def attempt(url: str, timeout: float, work: Callable[[Session], T]) -> T:
    """Returns the result of work in a session, with a new one for each of ATTEMPTS. Raises Unanswered."""
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


class GymTool(Tool):
    """The tools of an environment of NeMo Gym, over HTTP."""

    tool: Literal["nemo-gym"]
    """selects this tool"""
    url: LongLine = operational(...)
    """URL of the resources server, such as http://localhost:8000"""
    serves: Line
    """what runs there, such as nemo-gym 0.7.0 workplace_assistant"""
    timeout: Annotated[float, Range(0, 86400, above=True)] = operational(60.0)
    """seconds for one reply"""

    def functions(self, row: Row) -> list[dict[str, Any]]:
        return functions_of(row)

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Returns None: the server decides."""
        return None

    def open(self) -> Environment:
        return Environment(self.url.rstrip("/"), self.timeout)


def functions_of(row: Row) -> list[dict[str, Any]]:
    """Returns the functions that a task lists, in the form of OpenAI's responses or of its chats."""
    functions = []
    for tool in row["responses_create_params"].get("tools") or ():
        # OpenAI's chats nest the function, its responses do not.
        function = tool.get("function") or tool
        name = function.get("name")
        # A name becomes a path of the server, so it must not reach another one.
        if isinstance(name, str) and TOOL_NAME.fullmatch(name) and name not in RESERVED:
            functions.append({key: function.get(key) for key in ("name", "description", "parameters")})
    return functions


class Environment:
    """The running tool."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def run(self, calls: Sequence[Call]) -> list[Result]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(self._answer, calls))

    def _answer(self, call: Call) -> Result:
        # A session lives for one request, so the earlier calls are made again.
        requests = [(each.name, each.arguments) for each in (*call.before, call)]

        def work(session: Session) -> tuple[int, str]:
            return session.begin(call.row, requests)[-1]

        try:
            status, text = attempt(self.url, self.timeout, work)
        except Unanswered as error:
            raise ToolFailed(
                f"tool nemo-gym, task {call.row.get('id')}: {error}; see to that server, then start again"
            ) from None
        return Result("ok" if status < 400 else "error", text)

    def close(self) -> None: ...
