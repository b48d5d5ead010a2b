"""The pool that scores answers in limited processes, and whom it blames: the answer, the worker or the package."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stages.rl.protocols import Parts, Verifier, VerifierFailed, make_verifier
from stages.rl.rewards import pooled_verifier
from stages.rl.rollout.task_sources.procedural_tasks import reasoning_gym_rows
from stages.tasks import Row
from tests.fixtures.verifier_fixtures import (
    response_of,
    score_one,
    sum_row,
)


def test_who_is_to_blame_for_running_out_of_time(maths: Verifier, gym: Verifier) -> None:
    """The answer, as the row's own is scored correctly right after; and the other answers keep their rewards."""
    answers = [(sum_row(), response_of(text)) for text in ("4", "$9^{9^{9}}$", "5", "4")]
    assert [(p["reward"], p["unreadable"]) for p in maths.score(answers)] == [(1, 0), (0, 1), (0, 0), (1, 0)]
    # One of reasoning_gym's scorers raises on what is no number.
    (row,) = reasoning_gym_rows("prime_factorization", 1, 1)
    assert score_one(gym, row, "no number") == {"reward": 0, "finished": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (sum_row(""), "row m1: no expected_answer to score by"),
        ({k: v for k, v in sum_row().items() if k != "expected_answer"}, "row m1: no expected_answer"),
    ],
)
def test_a_row_that_cannot_be_scored_is_no_reward(maths: Verifier, row: Row, words: str) -> None:
    with pytest.raises(VerifierFailed, match=words):
        score_one(maths, row, "4")


def kill_workers(scorer: Verifier) -> int:
    """Kills every worker that runs, from outside. Returns how many."""
    processes = [w.process for w in scorer.workers if w.process]
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    return len(processes)


def test_killed_workers_are_replaced_and_their_answers_scored_again() -> None:
    scorer = make_verifier("math-verify", {"seconds": 1})
    answers = [(sum_row(), response_of("4")), (sum_row(), response_of("5"))] * 4
    right = [1, 0] * 4
    try:
        assert [p["reward"] for p in scorer.score(answers)] == right
        assert kill_workers(scorer)  # between steps
        assert [p["reward"] for p in scorer.score(answers)] == right
        with ThreadPoolExecutor(1) as pool:  # in the middle of one
            step = pool.submit(scorer.score, answers * 8)
            time.sleep(0.1)
            assert kill_workers(scorer)
            assert [p["reward"] for p in step.result()] == right * 8
    finally:
        scorer.close()


def test_a_worker_that_is_always_killed_is_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make_verifier("math-verify", {"seconds": 1})
    start = pooled_verifier.Worker._start

    def doomed(worker: pooled_verifier.Worker) -> None:
        start(worker)
        os.killpg(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(pooled_verifier.Worker, "_start", doomed)
    try:
        with pytest.raises(VerifierFailed, match="verifier math-verify, row m1: the scorer failed 3 times"):
            score_one(scorer, sum_row(), "4")
    finally:
        scorer.close()


def test_an_answer_is_not_blamed_for_what_befell_its_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, crash = {"score": 1.0}, {"score": 0.0}, {"signal": signal.SIGSEGV, "error": "SIGSEGV"}

    def outcome(*replies: dict[str, Any]) -> Parts:
        outcomes = iter(replies)
        monkeypatch.setattr(pooled_verifier.Worker, "ask", lambda *_: next(outcomes))
        return score_one(make_verifier("math-verify"), sum_row(), "4")

    # Probe, garbage, answer; and after a crash again probe, garbage.
    assert outcome(right, wrong, crash, right, wrong) == {"reward": 0, "finished": 1, "unreadable": 1}
    with pytest.raises(VerifierFailed, match="its own expected answer got SIGSEGV"):
        outcome(right, wrong, crash, crash)
    killed = {"signal": signal.SIGKILL, "error": "SIGKILL"}
    assert outcome(right, wrong, killed, right) == {"reward": 1, "finished": 1, "unreadable": 0}
    # Killed each time, while the probe is scored: the answer did it. If the probe is killed too, the machine does it.
    ended = outcome(right, wrong, killed, killed, killed, right, wrong)
    assert ended == {"reward": 0, "finished": 1, "unreadable": 1}
    with pytest.raises(VerifierFailed, match=r"failed 3 times \(it was killed from outside, as the kernel does"):
        outcome(right, wrong, killed, killed, killed, killed, killed, killed)


def test_a_worker_that_cannot_start_is_no_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = make_verifier("math-verify")
    try:
        with pytest.raises(
            VerifierFailed, match=r"row m1: the scorer failed 3 times \(ImportError: a broken installation\)"
        ):
            score_one(scorer, sum_row(), "4")
    finally:
        scorer.close()


def test_a_package_that_answers_nought_to_all_is_no_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the packages do where their own code raises."""
    (tmp_path / "math_verify.py").write_text("def parse(*a, **k): return []\ndef verify(*a, **k): return False\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = make_verifier("math-verify")
    try:
        with pytest.raises(VerifierFailed, match="its own expected answer got a score of 0.0"):
            score_one(scorer, sum_row(), "5")
    finally:
        scorer.close()


# In the worker's fork: what each does, and what comes of it.
FORKS: dict[str, tuple[Callable[[str], float], dict[str, Any]]] = {
    "killed": (lambda _: os.kill(os.getpid(), 9) or 0.0, {"error": "PermissionError: a scorer must not call os.kill"}),
    "crashed": (lambda _: (faulthandler.disable(), os.abort())[1], {"signal": signal.SIGABRT, "error": "SIGABRT"}),
    "greedy": (lambda _: float(len(bytearray(2 << 30))), {"error": "MemoryError: "}),
    "slow": (lambda _: float(len(str(9 ** (9**8)))), {"signal": signal.SIGXCPU, "error": "SIGXCPU"}),
    "raised": (lambda _: 1 / 0, {"error": "ZeroDivisionError: division by zero"}),
    "writes": (
        lambda _: Path("/tmp/atom-trace").write_text("x"),
        {"error": "PermissionError: a scorer must not call open"},
    ),
    "calls": (lambda _: os.system("true"), {"error": "PermissionError: a scorer must not call os.system"}),
    "connects": (
        lambda _: socket.socket() and 1.0,
        {"error": "PermissionError: a scorer must not call socket.__new__"},
    ),
    "gone": (lambda _: os._exit(0), {"error": "nothing"}),
    "beyond": (lambda _: 1.5, {"error": "a score of 1.5"}),
    "NaN": (lambda _: float("nan"), {"error": "a score of nan"}),
    "right": (lambda _: 1.0, {"score": 1.0}),
}


@pytest.mark.parametrize("attack", FORKS)
def test_a_fork_is_limited(attack: str) -> None:
    score, reply = FORKS[attack]
    assert pooled_verifier.score_in_fork(score, "", 1) == reply
