"""The worker of `scoring_pool`: scores each answer in a limited fork. `python -m stages.rl.rewards.scoring_worker KIND
SECONDS` reads requests, [a row's fields as JSON, an answer], and writes replies, one JSON line each.

A fork may use SECONDS of processor time and MEMORY bytes beyond what the worker has; it may not write, start a program
or open a connection (`refuse`). Nothing of one answer reaches the next.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

Bind = Callable[[Mapping[str, Any]], Callable[[str], float]]
"""A function of a row's fields that returns a scorer of answers in [0, 1]. Trusted work, such as parsing the right
answer, is done here, once a row, and outside the limits."""

MEMORY = 1 << 30


def math_verify() -> Bind:
    """Field expected_answer: LaTeX or a plain expression, as in NeMo Gym's math_with_judge.

    Of an answer, math-verify 0.9 gives sympy's evaluating parser digits and operators only; the rest goes through a
    grammar of LaTeX.
    """
    from math_verify import parse, verify

    # What sympy imports and generates at its first use, the forks then find done.
    verify(
        parse("$x^2+2x+1$", parsing_timeout=None), parse("$(x+1)^2$ or 0.5", parsing_timeout=None), timeout_seconds=None
    )

    def bind(row: Mapping[str, Any]) -> Callable[[str], float]:
        # The package's own time limits count wall time and answer 0; ours are the fork's.
        gold = parse(boxed(str(row["expected_answer"])), parsing_timeout=None)
        return lambda answer: float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))

    return bind


def boxed(answer: str) -> str:
    """A right answer as math-verify finds it best: in a box, unless it is marked as LaTeX already."""
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"


def reasoning_gym() -> Bind:
    """Fields question, answer, metadata with source_dataset, as in NeMo Gym's reasoning_gym.

    Some scorers call eval on the answer, some give it to sympy, which does. None is let: a scorer that cannot do
    without fails its probe, so that its dataset is refused; one that would only read a list in Python's notation so
    (n_queens, binary_matrix, spiral_matrix, string_insertion) takes the answer as it is written.
    """
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    scorer = cache(get_score_answer_fn)

    def bind(row: Mapping[str, Any]) -> Callable[[str], float]:
        name = row["metadata"].get("source_dataset")
        if name not in DATASETS:
            raise ValueError(f"reasoning_gym has no dataset {name}")
        score = scorer(name)

        def score_answer(answer: str) -> float:
            sys.addaudithook(refuse_evaluation)
            return float(score(answer, entry=dict(row)))

        return score_answer

    return bind


KINDS: dict[str, Callable[[], Bind]] = {"math-verify": math_verify, "reasoning-gym": reasoning_gym}
FORBIDDEN = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix", "os.re", "os.system", "shutil.", "socket.", "subp")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook for a fork. Not a sandbox for code, but nothing here runs any: a second lock."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"a judge must not call {event}")


def refuse_evaluation(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that lets no string be compiled, which eval and exec must do first."""
    if event == "compile" and isinstance(arguments[0], str | bytes) and arguments[1] == "<string>":
        raise PermissionError("the judge would have evaluated a string as Python, which needs the sandbox")


def score_in_fork(score: Callable[[str], float], answer: str, seconds: int) -> dict[str, Any]:
    """The reply of a fork that scores one answer."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        os.write(writable, json.dumps(_score_confined(score, answer, seconds)).encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        payload = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        signal_number = os.WTERMSIG(status)
        return {"signal": signal_number, "error": signal.Signals(signal_number).name}
    return dict(json.loads(payload)) if payload else {"error": "nothing"}


def _score_confined(score: Callable[[str], float], answer: str, seconds: int) -> dict[str, Any]:
    try:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        for limit, maximum in (
            (resource.RLIMIT_CPU, seconds),  # counts from the fork; SIGXCPU ends what no Python handler could
            (resource.RLIMIT_AS, size + MEMORY),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (maximum, maximum + 1 if limit == resource.RLIMIT_CPU else maximum))
        sys.addaudithook(refuse)
        value = score(answer)
        return {"score": value} if 0 <= value <= 1 else {"error": f"a score of {value}"}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}".encode(errors="replace").decode()}


def serve(kind: str, seconds: int) -> None:
    """Answers requests until standard input closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # what a package prints is no reply
    bind = KINDS[kind]()
    bound = lru_cache(maxsize=4096)(lambda fields: bind(json.loads(fields)))
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        fields, answer = json.loads(line)
        try:
            reply = score_in_fork(bound(fields), answer, seconds)
        except Exception as error:
            reply = {"broken": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
