"""A pool of workers that parse and score model output, each answer in a limited process of its own.

A worker (`scoring_worker`) imports the scorer's package once and forks for every answer.

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
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from stages.rl.protocols import Answer, Parts, Response, VerifierFailed
from stages.rl.rewards import scoring_worker
from stages.rl.rewards.scoring_worker import Reply
from stages.tasks.rows import Row

ATTEMPTS = 3
GARBAGE = "?"
START_SECONDS = 300  # to import the package, on a machine that is busy


class WorkerDied(Exception):
    """A worker ended, or did not reply in time."""


class ScoringPool:
    """The workers of one verifier. Thread-safe."""

    def __init__(
        self, name: str, verifier: str, fields: Sequence[str], probe: Callable[[Row], str], seconds: int
    ) -> None:
        """name, verifier: the verifier's, the latter as `module:class`; fields: those of a row that its scorer reads;
        probe: the correct answer to a row; seconds: processor time for one answer."""
        self.name, self.fields, self.probe = name, fields, probe
        count = min(8, len(os.sched_getaffinity(0)))
        self.workers = [Worker(verifier, seconds) for _ in range(count)]
        self._retry_lock = threading.Lock()
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """`reward` in [0, 1], `finished` and `unreadable` of each answer. Raises VerifierFailed."""
        requests = [(row, json.dumps(self._fields_of(row)), response) for row, response in answers]
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
        for answer, correct in ((self.probe(row), True), (GARBAGE, False)):
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
        """A worker's reply; `died` if no worker survived any of the ATTEMPTS."""
        worker = self.idle.get()
        try:
            reply = self._try(worker, row, fields, answer)
        finally:
            self.idle.put(worker)
        if "died" not in reply:
            return reply
        with self._retry_lock:  # the memory of a parallel answer can be the cause of its death
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


class Worker:
    """One worker process, started at the first request and again after its death. Not thread-safe."""

    def __init__(self, verifier: str, seconds: int) -> None:
        self.verifier, self.seconds = verifier, seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, fields: str, answer: str) -> Reply:
        """The reply to a request. fields: the row's, as JSON. Raises WorkerDied."""
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
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", scoring_worker.__name__, self.verifier, str(self.seconds)]
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
        if not line.endswith(b"\n"):
            self.stop()
            raise WorkerDied("its worker died" if ready else f"its worker did not reply within {seconds:.0f} s")
        return line
