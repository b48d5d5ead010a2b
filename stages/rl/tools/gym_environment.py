"""Tool `nemo-gym`: the tools of an environment of NeMo Gym, whose resources server answers over HTTP.

A task lists them in `responses_create_params.tools`. The verifier of the same name scores the answer in a session in
which its calls were made again (stages/rl/gym_session.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Line, LongLine, Range
from pipeline.core.stage import Inputs, Promise, operational
from stages.rl import gym_session
from stages.rl.gym_session import Session, Unanswered
from stages.rl.tools.base import Call, Result, Tool, ToolFailed
from stages.tasks.rows import Row

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
RESERVED = ("verify", "seed_session", "close_session", "aggregate_metrics", "mcp")
"""Paths of a server that are no tools."""


class GymTool(Tool):
    """The tools of an environment of NeMo Gym, over HTTP."""

    promise: ClassVar[Promise] = "numeric"

    tool: Literal["nemo-gym"] = Field(description="selects this tool")
    url: LongLine = operational(..., "URL of the resources server, such as http://localhost:8000")
    serves: Line = Field(description="what runs there, such as nemo-gym 0.7.0 workplace_assistant")
    timeout: Annotated[float, Range(0, 86400, above=True)] = operational(60.0, "seconds for one reply")

    def functions(self, row: Row) -> list[dict[str, Any]]:
        return functions_of(row)

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """The server decides."""
        return None

    def open(self, inputs: Inputs, folder: Path) -> Environment:
        return Environment(self.url.rstrip("/"), self.timeout)


def functions_of(row: Row) -> list[dict[str, Any]]:
    """The functions that a task lists, in the form of OpenAI's responses or of its chats."""
    functions = []
    for tool in row["responses_create_params"].get("tools") or ():
        function = tool.get("function") or tool
        name = function.get("name")
        if isinstance(name, str) and NAME.fullmatch(name) and name not in RESERVED:
            functions.append({key: function.get(key) for key in ("name", "description", "parameters")})
    return functions


class Environment:
    """The running tool."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def run(self, calls: Sequence[Call]) -> list[Result]:
        with ThreadPoolExecutor(gym_session.PARALLEL) as pool:
            return list(pool.map(self._answer, calls))

    def _answer(self, call: Call) -> Result:
        requests = [(each.name, each.arguments) for each in (*call.before, call)]

        def work(session: Session) -> tuple[int, str]:
            return session.begin(call.row, requests)[-1]

        try:
            status, text = gym_session.attempt(self.url, self.timeout, work)
        except Unanswered as error:
            raise ToolFailed(
                f"tool nemo-gym, task {call.row.get('id')}: {error}; see to that server, then start again"
            ) from None
        return Result("ok" if status < 400 else "error", text)

    def close(self) -> None: ...
