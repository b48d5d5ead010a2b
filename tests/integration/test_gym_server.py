"""A resources server of NeMo Gym's protocol: asked, asked again, and never believed when it is out of order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from stages.rl.protocols import VerifierFailed
from stages.rl.rewards.registry import make_verifier
from tests.fixtures.verifier_fixtures import (
    Server,
    client,
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


def test_a_server_that_was_never_there_is_no_reward(serve: Callable[..., Server]) -> None:
    with pytest.raises(VerifierFailed, match="Connection refused"):
        score_one(make_verifier("nemo-gym", {"url": "http://127.0.0.1:9", "serves": "nothing"}), sum_row(), "4")
