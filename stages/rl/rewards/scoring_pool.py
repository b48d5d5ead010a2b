"""A pool of workers that parse and score model output, each answer in a limited process of its own.

A worker (`scoring_worker`) imports the judge's package once and forks for every answer.

Who is to blame when there is no score? Each row carries its own right answer, the probe: a judge that works gives it
full marks, and less to GARBAGE.
- Before a row's answers are judged, its probe is. If the judge fails that, the judge or the row is broken:
  VerifierFailed. The packages answer 0 to most of their own exceptions, so this distinguishes a broken
  installation from a wrong answer.
- An answer on which the judge raised, crashed, or ran out of time or memory is followed by the probe. If that is judged
  rightly, the answer was to blame: reward 0, with the part `unreadable`. If not: VerifierFailed.
- A worker that died, or a fork that was killed by SIGKILL (which no limit here sends, but the kernel when memory runs
  out), says nothing of the answer: it is judged again, with nothing else in work. After ATTEMPTS the probe follows: if
  that is judged rightly, the answer did it: reward 0, `unreadable`. If not: VerifierFailed.
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
from typing import Any

from stages.rl.protocols import Parts, Response, Row, VerifierFailed
from stages.rl.rewards import scoring_worker

ATTEMPTS = 3
GARBAGE = "?"
START_SECONDS = 300  # to import the package, on a machine that is busy


class WorkerDied(Exception):
    """A worker ended, or did not reply in time."""


class ScoringPool:
    """Workers of one kind. Thread-safe. `probe` gives a row's expected answer as a model would write it."""

    def __init__(self, kind: str, fields: Sequence[str], probe: Callable[[Row], str], seconds: int) -> None:
        self.kind, self.fields, self.probe = kind, fields, probe
        count = min(8, len(os.sched_getaffinity(0)))
        self.workers = [Worker(kind, seconds) for _ in range(count)]
        self._retry_lock = threading.Lock()
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
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
            raise VerifierFailed(f"{self._label(row)}: no {' or '.join(missing)} to judge by; fix the row or drop it")
        return {name: row[name] for name in self.fields}

    def _label(self, row: Row) -> str:
        return f"verifier {self.kind}, row {row.get('id')}"

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
                    f"{self._label(row)}: the judge failed {ATTEMPTS} times ({reply['died']}); "
                    "see to the machine and start again"
                )
            if (reply.get("score") == 1) != correct:
                outcome = reply.get("error") or f"a score of {reply.get('score')}"
                subject = "its own expected answer" if correct else f"the answer {GARBAGE!r}"
                raise VerifierFailed(
                    f"{self._label(row)}: {subject} got {outcome}, so no answer to it can be judged; "
                    f"drop the row, or reinstall the package if every row says so"
                )

    def _request(self, row: Row, fields: str, answer: str) -> dict[str, Any]:
        """A worker's reply, or {"died": why}: all ATTEMPTS ended in a death."""
        worker = self.idle.get()
        try:
            reply = self._try(worker, row, fields, answer)
        finally:
            self.idle.put(worker)
        if "died" not in reply:
            return reply
        with self._retry_lock:  # the memory that an answer beside it takes can be what killed it
            workers = [self.idle.get() for _ in self.workers]
            try:
                for _ in range(1, ATTEMPTS):
                    if "died" not in (reply := self._try(workers[0], row, fields, answer)):
                        break
            finally:
                for worker in workers:
                    self.idle.put(worker)
        return reply

    def _try(self, worker: Worker, row: Row, fields: str, answer: str) -> dict[str, Any]:
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

    def __init__(self, kind: str, seconds: int) -> None:
        self.kind, self.seconds = kind, seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, fields: str, answer: str) -> dict[str, Any]:
        """{"score"}, or {"error"} or {"signal", "error"} of the answer, or {"broken"} of the row. Raises WorkerDied."""
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
        # Processor time is limited in the fork; this is for a machine that stands still.
        return dict(json.loads(self._read_line(60 + 20 * self.seconds)))

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
        # The hash seed is fixed since sympy's order of work can follow it, and no secret of ours is passed on.
        environment = {
            **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ},
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", scoring_worker.__name__, self.kind, str(self.seconds)]
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
            raise WorkerDied("its worker died" if ready else f"its worker said nothing for {seconds:.0f} s")
        return line
