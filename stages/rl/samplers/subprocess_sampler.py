"""The sampler in a process of its own on this machine: the decoder of `in-process` beside the training.

It draws the same answers, bit for bit. The trainer goes on while it draws, which asynchronous phases need. Its process
reads the weights from the folder that the trainer's ranks write, and compares every tensor with its digest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.core.errors import AtomError, MachineError
from stages.rl.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.rl.samplers import decode_process
from stages.rl.weights import Weights

RESTARTS = 3
"""How often in a row the process may die on one request."""


class ProcessLost(MachineError):
    """The process died before it replied."""


class SubprocessSampler(Sampler):
    """Starts its process with the first request, and anew when it dies."""

    def __init__(
        self, config: Mapping[str, Any], stops: Sequence[int], max_new_tokens: int, folder: Path, routes: bool = False,
        note: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """config: the content of config.json; folder: emptied; note: is told when the process died."""
        self.settings = {
            "config": dict(config), "stops": sorted(stops), "max_new_tokens": max_new_tokens, "routes": routes,
            "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        }  # fmt: skip
        self.folder, self.note = folder, note
        self.weights: Weights | None = None
        self.process: _Process | None = None
        self.closed = False
        self.lock = threading.Lock()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        config = {**context.config, "dtype": "float32", "torch_dtype": "float32"}
        tokens = context.settings.max_new_tokens
        return cls(config, context.stops, tokens, context.folder, context.routes, context.note)

    def load(self, weights: Weights) -> None:
        """Returns when the process has the weights in memory. It loads them before its next token. Raises AtomError if
        they are not those of the policy, ProcessLost if the process dies again and again."""
        if self.weights is not None and weights.digest == self.weights.digest:
            return
        self.weights = weights
        self._request(None)

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """Raises ProcessLost if the process dies again and again."""
        if self.weights is None:
            raise ValueError("weights are loaded before anything is drawn")
        reply = self._request({"prompts": [[prompt.ids, prompt.seed] for prompt in prompts], "greedy": greedy})
        return [
            Completion(
                tuple(ids), tuple(logprobs), finished, None if routes is None else bytes.fromhex(routes),
                tuple((digest, tokens) for digest, tokens in versions),
            )
            for ids, logprobs, finished, routes, versions in reply["completions"]
        ]  # fmt: skip

    def close(self) -> None:
        self.closed = True
        if (process := self.process) is not None:
            process.close()  # so that nobody who holds the lock waits for it
        with self.lock:
            if self.process is not None:
                self.process.close()

    def _request(self, request: Mapping[str, Any] | None) -> dict[str, Any]:
        """The reply; to None, once the process has the present weights."""
        for attempt in range(RESTARTS + 1):
            try:
                process = self._running()
                return process.request(request) if request is not None else {}
            except ProcessLost:
                if self.closed or attempt == RESTARTS:
                    raise
        raise AssertionError("unreachable")

    def _running(self) -> _Process:
        """The process with the present weights, started anew if it died."""
        with self.lock:
            if self.closed:
                raise ProcessLost("the sampler's process was ended")
            if self.process is None or self.process.is_lost:
                if self.process is not None:
                    self.note(f"{self.process.failure()}; it is started anew")
                    self.process.close()
                self.process = _Process(self.settings, self.folder / "sampler.log")
            process, weights = self.process, self.weights
            assert weights is not None
            if process.digest != weights.digest:
                reply = process.request({"folder": str(weights.folder), "digest": weights.digest})
                if "refused" in reply:
                    raise AtomError(f"the sampler's process refuses the weights: {reply['refused']}")
                process.digest = weights.digest
            return process


class _Process:
    """One process, and the thread that reads its replies."""

    def __init__(self, settings: Mapping[str, Any], log: Path) -> None:
        self.log, self.digest = log, ""
        self.replies: dict[int, Future[dict[str, Any]]] = {}
        self.count, self.is_lost, self.lock = 0, False, threading.Lock()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", decode_process.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, text=True,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        self._send(settings)

    def request(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ProcessLost if the process ends before it replies."""
        with self.lock:
            if self.is_lost:
                raise self.failure()
            self.count += 1
            number, reply = self.count, Future[dict[str, Any]]()
            self.replies[number] = reply
        self._send({**values, "id": number})
        return reply.result()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _send(self, values: Mapping[str, Any]) -> None:
        assert self.process.stdin
        with self.lock, contextlib.suppress(OSError, ValueError):  # it ended: `_read` says so to all who wait
            print(json.dumps(values), file=self.process.stdin, flush=True)

    def _read(self) -> None:
        assert self.process.stdout
        with contextlib.suppress(ValueError):  # a kill may cut a line
            for line in self.process.stdout:
                reply = json.loads(line)
                self.replies.pop(reply["id"]).set_result(reply)
        self.process.kill()
        self.process.wait()
        with self.lock:
            self.is_lost = True
            waiting = list(self.replies.values())
            self.replies.clear()
        for reply in waiting:
            reply.set_exception(self.failure())

    def failure(self) -> ProcessLost:
        """The error of a process that ended."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        ended = f"; its log {self.log} ends: {lines[-1][:500]}" if lines else ""
        return ProcessLost(f"the sampler's process died (exit code {self.process.returncode}){ended}")


SAMPLER = SubprocessSampler
