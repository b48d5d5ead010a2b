"""Verifier `nemo-gym`: a NeMo Gym resources server scores, by POST /verify. NeMo Gym itself is not needed.

Request: all fields of the row, `responses_create_params` among them, and the answer in the form of an OpenAI response
with the keys that NeMo Gym 0.4 and 0.7 require. Reply: `reward`, and fields of the server's own.

A task that lists tools is scored in a session in which the calls of its answer were made again. The environment must
answer them as it did when the answer was drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pipeline.core.bounds import Line, LongLine, Range
from pipeline.core.stage import Config
from stages.generation.protocols import ToolCall
from stages.rl.protocols import Answer, Parts, Response, Verifier, VerifierContext, VerifierFailed
from stages.rl.tools import gym_environment
from stages.rl.tools.gym_environment import Session, Unanswered, functions_of
from stages.tasks import Row

# The beginning of the mark that ends a recorded result whose rest is cut off (stages/rl/rollout/generation.py).
CUT_MARK = "\n[cut: "


class GymSettings(Config):
    """Settings of a client of a NeMo Gym resources server."""

    url: LongLine
    """URL of the server, such as http://host:port"""
    serves: Line
    """what runs there, such as nemo-gym 0.7.0 math_with_judge; it is part of the version"""
    timeout: Annotated[float, Range(0, 86400, above=True)] = 60.0
    """seconds for one answer"""


class GymServer(Verifier):
    """Scores answers by a server.

    Requests that are refused a connection, time out, or get 429 or 5xx are tried `gym_environment.ATTEMPTS` times.
    Parts: `reward`, `finished`, and the finite numbers that the server adds.
    """

    name = "nemo-gym"
    Settings = GymSettings

    def __init__(self, context: VerifierContext[GymSettings]) -> None:
        settings = context.settings
        self.url, self.timeout = settings.url.rstrip("/"), settings.timeout
        # The code of the server is not seen here, so the recipe states what runs there.
        self.version = f"1 {settings.serves}"

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Returns the parts of each answer's reward.

        Raises:
            VerifierFailed: The server cannot be reached, refuses, or answers without a finite reward.
        """
        with ThreadPoolExecutor(gym_environment.PARALLEL) as pool:
            return list(pool.map(lambda answer: self._score_answer(*answer), answers))

    def _score_answer(self, row: Row, response: Response) -> Parts:
        if not response.finished:
            return {"reward": 0.0, "finished": 0.0}
        body = request(row, response)
        try:
            payload = gym_environment.attempt(
                self.url, self.timeout, lambda session: self._verify(session, row, body, response)
            )
        except Unanswered as error:
            raise self._failure(row, str(error)) from None
        reply = read_reply(payload)
        if reply is None:
            shown = repr(payload[:200].decode(errors="replace"))
            raise self._failure(row, f"{self.url}/verify answered what is no JSON object: {shown}")
        parts: Parts = {}
        for name, value in reply.items():
            # A server can repeat the fields of the request, which are no parts of a reward.
            if name in body and name != "reward":
                continue
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                parts[name] = float(value)
        if "reward" not in parts:
            raise self._failure(row, f"{self.url}/verify answered without a finite reward ({reply.get('reward')!r})")
        return {**parts, "finished": 1.0}

    def _verify(self, session: Session, row: Row, body: Mapping[str, Any], response: Response) -> bytes:
        """Returns the reply of /verify in a new session.

        If the task has tools, the calls of the answer are made again before.

        Raises:
            Unanswered: The server did not score, or answers a call otherwise than when the answer was drawn.
        """
        if functions := functions_of(row):
            calls = [call for _, turn_calls in response.earlier for call in turn_calls if is_of(call, functions)]
            requests = [(call["tool"], json.loads(call["request"])["arguments"]) for call in calls]
            for call, (_, text) in zip(calls, session.begin(row, requests), strict=True):
                if not as_recorded(text, call["result"]):
                    raise Unanswered(
                        f"{self.url}/{call['tool']} answers a call otherwise than when the answer was drawn",
                        again=False,
                    )
        return session.post("verify", body)

    def _failure(self, row: Row, reason: str) -> VerifierFailed:
        return VerifierFailed(
            f"verifier {self.name}, row {row.get('id')}: {reason}; see to that server, then start again"
        )


def read_reply(payload: bytes) -> dict[str, Any] | None:
    """Returns the JSON object of a reply, if it is one."""
    try:
        reply = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def is_of(call: ToolCall, functions: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if the environment answered a call: it has that tool, and the call was not refused before."""
    names = [function["name"] for function in functions]
    return call["tool"] in names and call["status"] in ("ok", "error")


def as_recorded(text: str, result: str) -> bool:
    """Returns True if the reply `text` is the recorded `result`, as far as that was not cut."""
    # Recorded results have no lone surrogates (stages/rl/rollout/generation.py).
    text = text.encode(errors="replace").decode()
    if text == result:
        return True
    return CUT_MARK in result and text.startswith(result[: result.rindex(CUT_MARK)])


def request(row: Row, response: Response) -> dict[str, Any]:
    """Returns the body of POST /verify: messages of the answer, and calls of tools with their results.

    Lone surrogates of the answer, which UTF-8 cannot encode, become question marks.
    """
    output: list[dict[str, Any]] = []
    for text, calls in response.earlier:
        # In this form, calls are items of their own, so the text ends before the first one.
        output.append(message(text.partition("<tool_call>")[0]))
        for call in calls:
            call_id = f"call-{len(output)}"
            arguments = (read_reply(call["request"].encode()) or {}).get("arguments")
            output.append(
                {
                    "type": "function_call",
                    "call_id": call_id,
                    "name": call["tool"],
                    "status": "completed",
                    "arguments": json.dumps(arguments if isinstance(arguments, dict) else {}),
                }
            )
            output.append({"type": "function_call_output", "call_id": call_id, "output": call["result"]})
    answer = {
        # The form requires these keys; constants keep the request of an answer the same.
        "id": "response",
        "created_at": 0,
        "model": "atom",
        "object": "response",
        "output": [*output, message(response.answer)],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    return {**row, "response": answer}


def message(text: str) -> dict[str, Any]:
    """Returns a message of the assistant in the form of an OpenAI response."""
    content = {"type": "output_text", "text": text.encode(errors="replace").decode(), "annotations": []}
    return {"id": "message", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
