"""The worker of `ScoringPool`: scores each answer in a limited fork.

    python -m stages.rl.rewards.scoring_worker VERIFIER SECONDS

VERIFIER is the class of a pooled verifier, as `module:class`. The worker reads requests, [a row's fields as JSON, an
answer], and writes replies, one JSON line each.

A fork may use SECONDS of processor time and MEMORY bytes beyond what the worker has; it may not write, start a program
or open a connection (`refuse`). Nothing of one answer reaches the next.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pkgutil import resolve_name
from typing import Any, TypedDict, cast

from stages.tasks.rows import Row

# Scores an answer in [0, 1].
ScoreAnswer = Callable[[str], float]
# A function of a row's fields that returns a scorer of answers. Trusted work, such as parsing the correct answer, is
# done here, once per row, and outside the limits.
BindRow = Callable[[Row], ScoreAnswer]


class Reply(TypedDict, total=False):
    """The result for an answer.

    It has `score`; or `error`, with `signal` if one ended its fork; or `broken`, the reason why the row cannot be
    scored; or `died`, the reason why no worker replied.
    """

    score: float
    error: str
    signal: int
    broken: str
    died: str


# Bytes that a fork may use beyond what its worker has.
MEMORY = 1 << 30
# Beginnings of the audit events that a fork may not cause.
FORBIDDEN = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix", "os.re", "os.system", "shutil.", "socket.", "subp")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuses what a fork may not do. It is an audit hook.

    It is not a sandbox for code. No code of an answer runs here, so it is a second barrier.
    """
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"a scorer must not call {event}")


def score_in_fork(score: ScoreAnswer, answer: str, seconds: int) -> Reply:
    """Returns the reply of a fork that scores one answer."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        os.write(writable, json.dumps(_score_confined(score, answer, seconds)).encode())
        # Not sys.exit, which would run the exit handlers of the worker in its fork.
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        payload = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        signal_number = os.WTERMSIG(status)
        return {"signal": signal_number, "error": signal.Signals(signal_number).name}
    return cast(Reply, json.loads(payload)) if payload else {"error": "nothing"}


def _score_confined(score: ScoreAnswer, answer: str, seconds: int) -> Reply:
    try:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        for limit, maximum in (
            (resource.RLIMIT_CPU, seconds),  # counts from the fork; SIGXCPU needs no Python handler
            (resource.RLIMIT_AS, size + MEMORY),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            # The soft limit of processor time sends SIGXCPU. At the hard one the kernel sends SIGKILL, which would look
            # like a lack of memory.
            resource.setrlimit(limit, (maximum, maximum + 1 if limit == resource.RLIMIT_CPU else maximum))
        sys.addaudithook(refuse)
        value = score(answer)
        return {"score": value} if 0 <= value <= 1 else {"error": f"a score of {value}"}
    # Exits and a lack of memory too: the fork must reply.
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}".encode(errors="replace").decode()}


def serve(verifier: str, seconds: int) -> None:
    """Answers requests until standard input closes.

    Args:
        verifier: A pooled one, as `module:class`.
        seconds: Processor time for one answer.
    """
    # A package that reads standard input or prints must reach neither of the two pipes.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # output of a package is not a reply
    bind: BindRow = resolve_name(verifier).load_scorer()
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
