"""Verifiers whose package parses answers, and the pool of limited processes in which they run.

A worker imports the scorer's package once and forks for every answer:

    python -m stages.rl.rewards.pooled_verifier VERIFIER SECONDS

VERIFIER is the class of a pooled verifier, as `module:class`. The worker reads requests, [a row's fields as JSON, an
answer], and writes replies, one JSON line each. A fork may use SECONDS of processor time and MEMORY bytes beyond what
the worker has; it may not write, start a program or open a connection (`refuse`). Nothing of one answer reaches the
next.

If there is no score, a probe shows the cause. The probe is the row's own correct answer: a working scorer gives it full
marks, and less to GARBAGE.

- Before a row's answers are scored, its probe is. If the scorer fails that, the scorer or the row is broken:
  VerifierFailed. The packages score most of their own exceptions as 0, so this distinguishes a broken installation
  from a wrong answer.
- An answer on which the scorer raised, crashed, or ran out of time or memory is followed by the probe. If that is
  scored correctly, the answer was the cause: reward 0, with the part `unreadable`. If not: VerifierFailed.
- A worker that died, or a fork that was killed by SIGKILL (which no limit here sends, but the kernel when memory runs
  out), is no evidence about the answer: it is scored again, without other answers in parallel. After ATTEMPTS the probe
  follows: if that is scored correctly, the answer was the cause: reward 0, `unreadable`. If not: VerifierFailed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, TypedDict, cast

from pipeline.core.bounds import Range
from pipeline.core.errors import installing
from pipeline.core.stage import Config
from stages.rl.protocols import Answer, Parts, Response, Verifier, VerifierContext, VerifierFailed
from stages.tasks import Row

# Scores an answer in [0, 1].
ScoreAnswer = Callable[[str], float]
# A function of a row's fields that returns a scorer of answers. Trusted work, such as parsing the correct answer, is
# done here, once per row, and outside the limits.
BindRow = Callable[[Row], ScoreAnswer]


# Times that an answer is tried while its worker dies.
ATTEMPTS = 3
# An answer to which no working scorer gives full marks.
GARBAGE = "?"
START_SECONDS = 300  # to import the package, on a machine that is busy
# Bytes that a fork may use beyond what its worker has.
MEMORY = 1 << 30
# Beginnings of the audit events that a fork may not cause.
FORBIDDEN = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix", "os.re", "os.system", "shutil.", "socket.", "subp")


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


class WorkerDied(Exception):
    """A worker ended, or did not reply in time."""


class Worker:
    """One worker process, started at the first request and again after its death. Not thread-safe."""

    def __init__(self, verifier: str, seconds: int) -> None:
        self.verifier, self.seconds = verifier, seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, fields: str, answer: str) -> Reply:
        """Returns the reply to a request.

        Args:
            fields: Fields of the row, as JSON.
            answer: The answer to score.

        Raises:
            WorkerDied: There is no reply.
        """
        if self.process is None:
            self._start()
        process = self.process
        assert process and process.stdin
        try:
            process.stdin.write(json.dumps([fields, answer]).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self.stop()
            raise WorkerDied("its worker was gone") from None
        # Processor time is limited in the fork; this is for a machine that stalls.
        return cast(Reply, json.loads(self._read_line(60 + 20 * self.seconds)))

    def stop(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                # The whole group, since a fork of the worker can still run.
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe
                with contextlib.suppress(OSError):
                    pipe.close()
            self.process = None

    def _start(self) -> None:
        # The hash seed is fixed because sympy's order of work can depend on it, and no secret is passed on.
        environment = {
            **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ},
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",
            # A fork keeps none of its parent's threads, and the workers run in parallel already.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", __name__, self.verifier, str(self.seconds)]
        # Not a pipe, which nobody would read while the worker runs.
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
            try:
                self._read_line(START_SECONDS)
            except WorkerDied as error:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                raise WorkerDied(lines[-1] if lines else str(error)) from None

    def _read_line(self, seconds: float) -> bytes:
        assert self.process and self.process.stdout
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        ready = poll.poll(1000 * seconds)
        line = self.process.stdout.readline() if ready else b""
        # A worker that dies while it writes leaves part of a line.
        if not line.endswith(b"\n"):
            self.stop()
            raise WorkerDied("its worker died" if ready else f"its worker did not reply within {seconds:.0f} s")
        return line


class PoolSettings(Config):
    """Settings of a verifier that runs in limited processes."""

    seconds: Annotated[int, Range(1, 86400)] = 5
    """processor time for one answer, in seconds"""


class PooledVerifier(Verifier):
    """A verifier whose scorer runs in a pool of limited processes. Thread-safe.

    Parts: `reward`, `finished`, `unreadable`. The version names that of each package.
    """

    # Distributions that the score depends on; the first one is what a user installs.
    packages: ClassVar[tuple[str, ...]]
    # The row's fields that the scorer reads.
    fields: ClassVar[tuple[str, ...]]
    Settings = PoolSettings

    def __init__(self, context: VerifierContext[PoolSettings]) -> None:
        self.version = " ".join(["1", *(f"{package} {version(package)}" for package in self.packages)])
        place = f"{type(self).__module__}:{type(self).__qualname__}"
        # Each starts at its first request.
        self.workers = [Worker(place, context.settings.seconds) for _ in range(min(8, len(os.sched_getaffinity(0))))]
        self._retry_lock = threading.Lock()
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    @classmethod
    def missing(cls) -> str | None:
        for package in cls.packages:
            try:
                version(package)
            except PackageNotFoundError:
                return f"{package} is not installed; {installing('rl')}"
        return None

    @staticmethod
    @abstractmethod
    def load_scorer() -> BindRow:
        """Imports the package and returns its scorer. Called in a worker."""

    @staticmethod
    @abstractmethod
    def correct_answer(row: Row) -> str:
        """Returns a correct answer to the row, in the form of a model's answer."""

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Returns `reward` in [0, 1], `finished` and `unreadable` of each answer. Raises VerifierFailed."""
        requests = [(row, json.dumps(self._fields_of(row)), response) for row, response in answers]
        # One probe for each row, however many answers it has.
        rows = {fields: row for row, fields, response in requests if response.finished}
        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(lambda item: self._probe(item[1], item[0]), rows.items()))
            return list(pool.map(lambda item: self._score_answer(*item), requests))

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _fields_of(self, row: Row) -> dict[str, Any]:
        missing = [name for name in self.fields if row.get(name) in (None, "")]
        if missing:
            raise VerifierFailed(f"{self._label(row)}: no {' or '.join(missing)} to score by; fix the row or drop it")
        return {name: row[name] for name in self.fields}

    def _label(self, row: Row) -> str:
        return f"verifier {self.name}, row {row.get('id')}"

    def _score_answer(self, row: Row, fields: str, response: Response) -> Parts:
        if not response.finished:
            return {"reward": 0.0, "finished": 0.0, "unreadable": 0.0}
        reply = self._request(row, fields, response.answer)
        if "score" in reply:
            return {"reward": float(reply["score"]), "finished": 1.0, "unreadable": 0.0}
        self._probe(row, fields)
        return {"reward": 0.0, "finished": 1.0, "unreadable": 1.0}

    def _probe(self, row: Row, fields: str) -> None:
        for answer, correct in ((self.correct_answer(row), True), (GARBAGE, False)):
            reply = self._request(row, fields, answer)
            if "died" in reply:
                raise VerifierFailed(
                    f"{self._label(row)}: the scorer failed {ATTEMPTS} times ({reply['died']}); "
                    "check the machine and start again"
                )
            if (reply.get("score") == 1) != correct:
                outcome = reply.get("error") or f"a score of {reply.get('score')}"
                subject = "its own expected answer" if correct else f"the answer {GARBAGE!r}"
                raise VerifierFailed(
                    f"{self._label(row)}: {subject} got {outcome}, so no answer to it can be scored; "
                    f"drop the row, or reinstall the package if every row says so"
                )

    def _request(self, row: Row, fields: str, answer: str) -> Reply:
        """Returns a worker's reply; `died` if no worker survived any of the ATTEMPTS."""
        worker = self.idle.get()
        try:
            reply = self._try(worker, row, fields, answer)
        finally:
            self.idle.put(worker)
        if "died" not in reply:
            return reply
        with self._retry_lock:  # the memory of a parallel answer can be the cause of its death
            # All workers are taken, so that no other answer is scored meanwhile.
            workers = [self.idle.get() for _ in self.workers]
            try:
                for _ in range(1, ATTEMPTS):
                    if "died" not in (reply := self._try(workers[0], row, fields, answer)):
                        break
            finally:
                for worker in workers:
                    self.idle.put(worker)
        return reply

    def _try(self, worker: Worker, row: Row, fields: str, answer: str) -> Reply:
        try:
            reply = worker.ask(fields, answer)
        except WorkerDied as error:
            return {"died": str(error)}
        if "broken" in reply:
            raise VerifierFailed(f"{self._label(row)}: {reply['broken']}; fix the row or drop it")
        if reply.get("signal") == signal.SIGKILL:
            return {"died": "it was killed from outside, as the kernel does when memory runs out"}
        return reply


class MathVerify(PooledVerifier):
    """Verifier `math-verify`: mathematical equality.

    Row, as NeMo Gym's math_with_judge: question, expected_answer (LaTeX or a plain expression).

    math-verify 0.9 passes only digits and operators of an answer to sympy's evaluating parser; the rest is parsed by
    a grammar of LaTeX.
    """

    name = "math-verify"
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
    fields = ("expected_answer",)

    @staticmethod
    def load_scorer() -> BindRow:
        from math_verify import parse, verify

        # Modules and tables that sympy loads at its first use are then available in every fork.
        verify(
            parse("$x^2+2x+1$", parsing_timeout=None),
            parse("$(x+1)^2$ or 0.5", parsing_timeout=None),
            timeout_seconds=None,
        )

        def bind(row: Row) -> ScoreAnswer:
            # The package's own time limits count wall time and score 0; the fork's limit counts processor time.
            gold = parse(boxed(str(row["expected_answer"])), parsing_timeout=None)
            return lambda answer: float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))

        return bind

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        constants = ("0", "1", "-1", "x", "\\infty", "nan", "\\emptyset", "\\mathbb{R}")
        # A digit more makes an answer wrong.
        right = str(row.get("expected_answer"))
        low, high = f"{right}1", f"{right}2"
        return {
            **{f"{constant} in a box": boxed(constant) for constant in constants},
            "three boxes, the second right": f"\\boxed{{{low}}} \\boxed{{{right}}} \\boxed{{{high}}}",
            "three boxes with 'and'": f"\\boxed{{{low}}} and \\boxed{{{right}}} and \\boxed{{{high}}}",
            "three answers in a box": f"\\boxed{{{low}, {right}, {high}}}",
            "three answers in a box with 'or'": f"\\boxed{{{low} \\text{{ or }} {right} \\text{{ or }} {high}}}",
            "an equation of three in a box": f"\\boxed{{{low} = {right} = {high}}}",
        }

    @staticmethod
    def correct_answer(row: Row) -> str:
        return boxed(str(row["expected_answer"]))


def boxed(answer: str) -> str:
    """Returns a correct answer as math-verify parses it best: in a box, unless it is marked as LaTeX already."""
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"


class ReasoningGym(PooledVerifier):
    """Verifier `reasoning-gym`: the score by a dataset of that package.

    Row, as NeMo Gym's reasoning_gym: question, answer, metadata with source_dataset.

    Refuses datasets whose own answers do not get full marks here; the task source reports them before a run.

    In 0.1.25 they evaluate the answer as Python (bitwise_arithmetic, countdown, puzzle24, number_sorting,
    polynomial_multiplication, the two integrations), have no answer in the row (boxnet, graph_color,
    propositional_logic, rubiks_cube, rush_hour), lose by JSON (arc_agi, rearc), or give any answer full marks
    (game_of_life_halting).

    Some scorers call eval on the answer, others pass it to sympy, which does. Both are blocked: a scorer that requires
    eval fails its probe, so that its dataset is refused; one that only reads a list in Python's notation (n_queens,
    binary_matrix, spiral_matrix, string_insertion) uses the text of the answer.
    """

    name = "reasoning-gym"
    packages = ("reasoning-gym",)
    fields = ("question", "answer", "metadata")

    @staticmethod
    def load_scorer() -> BindRow:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn

        scorer = cache(get_score_answer_fn)

        def bind(row: Row) -> ScoreAnswer:
            name = row["metadata"].get("source_dataset")
            if name not in DATASETS:
                raise ValueError(f"reasoning_gym has no dataset {name}")
            score = scorer(name)

            def score_answer(answer: str) -> float:
                # Added in the fork, since a hook cannot be removed.
                sys.addaudithook(_refuse_evaluation)
                return float(score(answer, entry=dict(row)))

            return score_answer

        return bind

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Returns, for `knights_knaves`, roles that do not depend on what the people say."""
        metadata = row.get("metadata")
        if not isinstance(metadata, dict) or not {"names", "knight_knave_terms"} <= metadata.keys():
            return {}
        names, terms = metadata["names"], metadata["knight_knave_terms"]
        knight, knave = f"is {terms['a_knight']}", f"is {terms['a_knave']}"
        return {
            "all are knights": ", ".join(f"{name} {knight}" for name in names),
            "all are knaves": ", ".join(f"{name} {knave}" for name in names),
            "one is both": f"{names[0]} {knight}, {names[0]} {knave}",
        }

    @staticmethod
    def correct_answer(row: Row) -> str:
        return str(row["answer"])


def _refuse_evaluation(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuses to compile strings, the first step of eval and exec. It is an audit hook."""
    if event == "compile" and isinstance(arguments[0], str | bytes) and arguments[1] == "<string>":
        raise PermissionError("the scorer would have evaluated a string as Python, which needs the sandbox")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
