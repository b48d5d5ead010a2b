"""What the tests of verifiers share: rows, answers, and a real server of NeMo Gym's protocol."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stages.rl.protocols import Parts, Response, Row, Verifier
from stages.rl.rewards import gym_server
from stages.rl.rewards.verifiers import make_verifier, to_row

ARGUMENTS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["tea", "milk"]},
    "keywords:frequency": {"keyword": "tea", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["tea"]},
    "keywords:letter_frequency": {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
    "length_constraints:number_words": {"num_words": 4, "relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "less than"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say this."},
    "startend:start_checker": {"start_phrase": "Dear"},
    "startend:end_checker": {"end_phrase": "Bye."},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}


def response_of(text: str, finished: bool = True) -> Response:
    return Response.parse(text, finished)


def score_one(scorer: Verifier, row: Row, text: str, finished: bool = True) -> Parts:
    return scorer.score([(row, response_of(text, finished))])[0]


@pytest.fixture(scope="module")
def maths() -> Iterator[Verifier]:
    scorer = make_verifier("math-verify", seconds=1)
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def gym() -> Iterator[Verifier]:
    scorer = make_verifier("reasoning-gym", seconds=1)
    yield scorer
    scorer.close()


def sum_row(expected: str = "4") -> dict[str, Any]:
    return to_row("m1", "2+2?", "math-verify", "arithmetic", 0, question="2+2?", expected_answer=expected)


def gym_row(dataset: str = "gcd") -> dict[str, Any]:
    entry = {"question": "Find the GCD of 12 and 18.", "answer": "6", "metadata": {"source_dataset": dataset}}
    return to_row("g1", entry["question"], "reasoning-gym", dataset, 0, **entry)


def form_row(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    names, kwargs = [name for name, _ in instructions], [arguments for _, arguments in instructions]
    return to_row("i1", "Write.", "instructions", "form", 0, prompt="Write.", instruction_id_list=names, kwargs=kwargs)


# --- a real server of NeMo Gym's protocol -----------------------------------------------------------------------------

REPLY_KEYS = {"id", "created_at", "model", "object", "output", "parallel_tool_calls", "tool_choice", "tools"}


class Server(ThreadingHTTPServer):
    """Answers POST /verify with (status, body) as `reply(n, request)` says, n counting requests; None hangs up."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, bytes] | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.seen, self.lock = reply, [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(request)
            number = len(self.server.seen)
        reply = self.server.reply(number, request) if self.path == "/verify" else (404, b"no such path")
        if reply is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *_: Any) -> None: ...


def scoring_handler(_: int, request: dict[str, Any]) -> tuple[int, bytes]:
    """As NeMo Gym's servers: 422 for what the schema lacks, else an echo with a reward."""
    response = request.get("response", {})
    if REPLY_KEYS - set(response) or not request["responses_create_params"].get("input"):
        return 422, b'{"detail":"Field required"}'
    (message,) = response["output"]
    if not {"id", "content", "type", "role"} <= set(message) or "annotations" not in message["content"][0]:
        return 422, b'{"detail":"Field required"}'
    right = message["content"][0]["text"].strip() == request["expected_answer"]
    return 200, json.dumps({**request, "reward": float(right), "library_reward": 0.5, "extracted": "x"}).encode()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setattr(gym_server, "BACK_OFF", 0.01)
    servers: list[Server] = []

    def start(reply: Callable[[int, dict[str, Any]], tuple[int, bytes] | None]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(server: Server, timeout: float = 20.0) -> Verifier:
    return make_verifier("nemo-gym", url=server.url, serves="a test", timeout=timeout)
