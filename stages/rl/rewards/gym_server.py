"""Verifier `nemo-gym`: a NeMo Gym resources server scores, by POST /verify. NeMo Gym itself is not needed.

Request: the row's own fields, `responses_create_params`, and the answer in the form of an OpenAI response, all of whose
keys below NeMo Gym 0.4 requires. Reply: `reward`, and fields of the server's own.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Line, LongLine, Range
from pipeline.core.stage import Config
from stages.rl.direct_requests import DIRECT
from stages.rl.protocols import Answer, Parts, Response, Row, Verifier, VerifierContext, VerifierFailed

ATTEMPTS = 5
BACK_OFF = 1.0  # seconds before the second attempt; doubled for each further one
PARALLEL = 16


class GymSettings(Config):
    """Settings of a client of a NeMo Gym resources server."""

    url: LongLine = Field(description="URL of the server, such as http://host:port")
    serves: Line = Field(
        description="what runs there, such as nemo-gym 0.4.0 math_with_judge; it is part of the version"
    )
    timeout: Annotated[float, Range(0, 86400, above=True)] = Field(60.0, description="seconds for one answer")


class GymServer(Verifier):
    """Scores answers by a server. Refused connections, time-outs, 429 and 5xx are tried ATTEMPTS times.

    Parts: `reward`, `finished`, and the finite numbers that the server adds.
    """

    name = "nemo-gym"
    Settings = GymSettings

    def __init__(self, context: VerifierContext[GymSettings]) -> None:
        settings = context.settings
        self.url, self.timeout = settings.url.rstrip("/") + "/verify", settings.timeout
        self.version = f"1 {settings.serves}"

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Raises VerifierFailed if the server cannot be reached, refuses, or answers without a finite reward."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(lambda answer: self._score_answer(*answer), answers))

    def _score_answer(self, row: Row, response: Response) -> Parts:
        if not response.finished:
            return {"reward": 0.0, "finished": 0.0}
        body = request(row, response)
        reply = self._post(row, json.dumps(body).encode())
        numbers = {
            name: float(value)
            for name, value in reply.items()
            if name not in body and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if not math.isfinite(numbers.get("reward", math.nan)):
            raise self._failure(row, f"answered without a finite reward ({reply.get('reward')!r})")
        return {**{k: v for k, v in numbers.items() if math.isfinite(v)}, "finished": 1.0}

    def _post(self, row: Row, body: bytes) -> dict[str, Any]:
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACK_OFF * 2 ** (attempt - 1))
            http_request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            try:
                with DIRECT.open(http_request, timeout=self.timeout) as http_response:
                    payload = http_response.read()
                break
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"answered {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise self._failure(row, reason) from None
            except (OSError, http.client.HTTPException) as error:
                reason = f"did not answer ({getattr(error, 'reason', error) or type(error).__name__})"
        else:
            raise self._failure(row, f"{reason}, {ATTEMPTS} times")
        try:
            reply = json.loads(payload)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failure(row, f"answered what is no JSON object: {payload[:200].decode(errors='replace')!r}")
        return reply

    def _failure(self, row: Row, reason: str) -> VerifierFailed:
        return VerifierFailed(
            f"verifier {self.name}, row {row.get('id')}: {self.url} {reason}; see to that server, then start again"
        )


def request(row: Row, response: Response) -> dict[str, Any]:
    """The body of POST /verify. Lone surrogates of the answer, which UTF-8 cannot encode, become question marks."""
    text = response.answer.encode(errors="replace").decode()
    message = {
        "id": "message",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    reply = {
        "id": "response",
        "created_at": 0,
        "model": "atom",
        "object": "response",
        "output": [message],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    return {**row, "response": reply}


VERIFIER = GymServer
