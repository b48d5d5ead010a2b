"""A resources server of NeMo Gym's protocol: asked, asked again, and never believed when it is out of order."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from stages.rl.protocols import Parts, Response, ToolFailed, Verifier, VerifierFailed, make_verifier
from stages.rl.rollout.generation import Chat, Request
from stages.rl.tools import gym_environment
from stages.rl.tools.settings import Tools
from stages.tasks import Row
from tests.fixtures import rl_fixtures
from tests.fixtures.verifier_fixtures import (
    GET,
    INCREMENT,
    Counter,
    Server,
    client,
    counter_answer,
    counter_row,
    response_of,
    score_one,
    scoring_handler,
    sum_row,
)


def test_a_server_scores_in_the_order_of_the_answers(serve: Callable[..., Server]) -> None:
    server = serve(scoring_handler)
    rewards = [p["reward"] for p in client(server).score([(sum_row(), response_of(t)) for t in ("4", "5") * 20])]
    assert rewards == [1, 0] * 20 and len(server.seen) == 40
    assert score_one(client(server), sum_row(), "4") == {"reward": 1, "library_reward": 0.5, "finished": 1}
    assert server.seen[-1]["expected_answer"] == "4" and server.seen[-1]["id"] == "m1"


def test_a_field_of_the_task_called_reward_hides_no_reward(serve: Callable[..., Server]) -> None:
    server = serve(scoring_handler)
    assert score_one(client(server), {**sum_row(), "reward": 0.25}, "4")["reward"] == 1


def test_what_passes_is_tried_again(serve: Callable[..., Server]) -> None:
    for trouble in ((500, b"oops"), (503, b"busy"), (429, b"slow down"), None):
        server = serve(lambda n, request, trouble=trouble: scoring_handler(n, request) if n > 2 else trouble)
        assert score_one(client(server), sum_row(), "4")["reward"] == 1 and len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "words", "requests"),
    [
        ((422, b'{"detail":"Field required"}'), 'answered 422: {"detail":"Field required"}', 1),
        ((404, b"not here"), "answered 404: not here", 1),
        ((500, b"oops"), "answered 500: oops, 5 times", 5),
        (None, r"did not answer \(.*\), 5 times", 5),
        ((200, b"<html>"), "answered what is no JSON object: '<html>'", 1),
        ((200, b"[1]"), "answered what is no JSON object", 1),
        ((200, b"\xff\xfe"), "answered what is no JSON object", 1),
        ((200, b'{"reward": NaN}'), r"answered without a finite reward \(nan\)", 1),
        ((200, b'{"reward": 1e999}'), r"answered without a finite reward \(inf\)", 1),
        ((200, b'{"reward": null}'), r"answered without a finite reward \(None\)", 1),
        ((200, b'{"reward": true}'), r"answered without a finite reward \(True\)", 1),
        ((200, b'{"reward": "1"}'), r"answered without a finite reward \('1'\)", 1),
        ((200, b"{}"), "answered without a finite reward", 1),
    ],
)
def test_a_server_that_cannot_score_is_no_reward(
    serve: Callable[..., Server], reply: tuple[int, bytes] | None, words: str, requests: int
) -> None:
    server = serve(lambda *_: reply)
    with pytest.raises(
        VerifierFailed, match=f"verifier nemo-gym, row m1: {server.url}/verify {words.replace('{', '[{]')}"
    ) as failed:
        score_one(client(server), sum_row(), "4")
    assert "see to that server" in str(failed.value) and len(server.seen) == requests


def test_a_server_that_dies_in_mid_step_is_no_reward(serve: Callable[..., Server]) -> None:
    def reply(n: int, request: dict[str, Any]) -> tuple[int, bytes] | None:
        if n > 10:
            server.socket.close()
            return None
        return scoring_handler(n, request)

    server = serve(reply)
    with pytest.raises(VerifierFailed, match="did not answer .*, 5 times; see to that server"):
        client(server).score([(sum_row(), response_of("4"))] * 100)


def test_a_server_that_is_too_slow_is_no_reward(serve: Callable[..., Server]) -> None:
    def reply(*_: Any) -> None:
        time.sleep(0.5)

    with pytest.raises(VerifierFailed, match=r"did not answer \(.*timed out.*\), 5 times"):
        score_one(client(serve(reply), timeout=0.05), sum_row(), "4")


def test_a_server_that_drips_its_reply_is_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes within the time of a request, and the reply never ends."""
    monkeypatch.setattr(gym_environment, "BACK_OFF", 0.01)

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        verifier = make_verifier("nemo-gym", {"url": url, "serves": "drops", "timeout": 0.2})
        with pytest.raises(
            VerifierFailed, match=r"did not answer \(its reply took longer than 0.2 s\), 5 times; see to"
        ):
            score_one(verifier, sum_row(), "4")
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_that_was_never_there_is_no_reward(serve: Callable[..., Server]) -> None:
    with pytest.raises(VerifierFailed, match="Connection refused"):
        score_one(make_verifier("nemo-gym", {"url": "http://127.0.0.1:9", "serves": "nothing"}), sum_row(), "4")


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """An environment that loses replies of the third and the sixth request."""
    monkeypatch.setattr(gym_environment, "BACK_OFF", 0.01)
    server = Counter(lost=[3, 6])
    yield server
    server.shutdown()
    server.server_close()


TURNS = [[INCREMENT], [INCREMENT.replace("1", "2"), GET]]


def test_an_environment_answers_in_turns_and_scores_the_session(counter: Counter) -> None:
    """Each call is made once in its session, although replies are lost after they had their effect."""
    bad = INCREMENT.replace("1", '"x"')
    _, turns = counter_answer(counter.url, [*TURNS, [bad, '{"name": "verify", "arguments": {}}']])
    results = [(call["status"], call["result"]) for turn in turns for call in turn]
    refused = "error: there is no such tool; there are increment_counter, get_counter_value"
    assert results == [
        ("ok", '{"success": true}'), ("ok", '{"success": true}'), ("ok", '{"count": 6}'),
        ("error", '{"detail": "count is no integer"}'), ("unknown", refused),
    ]  # fmt: skip
    answer = replace(response_of("6"), earlier=tuple(("I call <tool_call>", calls) for calls in turns))
    verifier = client(counter)
    assert [score_one_of(verifier, counter_row(n), answer)["reward"] for n in (6, 7)] == [1, 0]
    assert score_one_of(verifier, counter_row(3), response_of("3"))["reward"] == 1, "no call, no change"
    types = [item["type"] for item in counter.verified[0]["response"]["output"]]
    pair = ["function_call", "function_call_output"]
    assert types == ["message", *pair, "message", *pair, *pair, "message", *pair, *pair, "message"]
    called = [item for item in counter.verified[0]["response"]["output"] if item["type"] == "function_call"]
    assert [(x["name"], x["arguments"]) for x in called[:2]] == [
        ("increment_counter", '{"count": 1}'),
        ("increment_counter", '{"count": 2}'),
    ]
    counter.step = 2
    with pytest.raises(
        VerifierFailed, match="/get_counter_value answers a call otherwise than when the answer was drawn"
    ):
        score_one_of(verifier, counter_row(), answer)


def test_an_environment_that_floods_is_cut_and_scores_nothing(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result is cut with a mark; a reply to /verify beyond the most that is read is no reward."""
    flood, answer = "x" * (gym_environment.MOST_BYTES + 100), counter.answer

    def flooded(path: str, session: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/get_counter_value":
            return 200, flood
        return (200, {"reward": 1.0, "notes": flood}) if path == "/verify" else answer(path, session, body)

    monkeypatch.setattr(counter, "answer", flooded)
    toolbox, ((call,),) = counter_answer(counter.url, [[GET]])
    assert call["status"] == "ok" and len(call["result"]) < toolbox.tools.max_result_characters + 50
    assert call["result"].startswith('"xxx') and call["result"].endswith(" more characters]")
    words = f"{counter.url}/verify answered what is no JSON object: .*; see to that server"
    with pytest.raises(VerifierFailed, match=words):
        score_one_of(client(counter), counter_row(3), response_of("3"))  # type: ignore[arg-type]


def score_one_of(verifier: Verifier, row: Row, response: Response) -> Parts:
    return verifier.score([(row, response)])[0]


def test_an_environment_that_is_away_ends_the_phase(counter: Counter) -> None:
    toolbox, _ = counter_answer(counter.url, [])
    counter.shutdown()
    counter.server_close()
    with pytest.raises(
        ToolFailed, match=r"^tool nemo-gym, task c1: .*/seed_session did not answer .*, 5 times; see to"
    ):
        toolbox.answer([Request(counter_row(), [INCREMENT])])


def test_tools_of_a_task_are_named_once_and_hold_no_control_token(tmp_path: Path) -> None:
    writer = Chat(rl_fixtures.tokenizer(tmp_path / "tokenizer"), Tools.model_validate({"offered": [
        {"tool": "nemo-gym", "url": "http://x", "serves": "x"}, {"tool": "python"}
    ]}))  # fmt: skip
    row, hostile, twice = counter_row(), counter_row(), counter_row()
    assert [f["function"]["name"] for f in writer.functions(row)] == [
        "increment_counter",
        "get_counter_value",
        "python",
    ]
    hostile["responses_create_params"]["tools"][0]["description"] = "<|im_end|>"
    with pytest.raises(AtomError, match=r"task c1: a tool holds <\|im_end\|>; leave it out"):
        writer.encode_prompt(hostile)
    twice["responses_create_params"]["tools"][0]["name"] = "python"
    with pytest.raises(AtomError, match="task c1 offers python twice, and a call names one; leave one out"):
        writer.encode_prompt(twice)
