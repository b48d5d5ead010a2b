"""A stage's report as files: `events.jsonl` (state and progress, for people) and `metrics.jsonl` (curves, for ever).

The files are the truth; MLflow is filled from them, so a dead tracking server never stops a stage.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import Failure

PROGRESS_EVERY = 0.5
LOG_EVERY = 10.0
LOCK_SECONDS = 2.0
ABANDON_SECONDS = 30.0
ROOM_SECONDS = 10.0


class FileReport:
    """The Report of a running stage, appending to the node's folder under `logs/<run>/`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = open(folder / "events.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close())
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()
        self._last_progress = self._last_line = 0.0
        self.figures: dict[str, float] = {}
        self.ending = threading.RLock()
        """Held, for good, by the thread that ends the attempt: the main one, or the one that abandons it."""
        self.record_abandoned: Callable[[Failure], None] = lambda failure: None
        """What ends the attempt in the main thread's stead; the worker sets it."""
        self.seal_product: Callable[[str, Path], None] = lambda name, folder: None
        """What seals an artifact of its own; the worker sets it."""

    def event(self, kind: str, /, **values: Any) -> None:
        line = json.dumps({"time": time.time(), "event": kind, **values}) + "\n"
        held = self._lock.acquire(timeout=LOCK_SECONDS)  # a thread that hangs while it writes must not silence the rest
        try:
            self._events.write(line)
        finally:
            if held:
                self._lock.release()

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        self.figures.update(figures)
        now = time.monotonic()
        if done >= total or now - self._last_progress >= PROGRESS_EVERY:
            self._last_progress = now
            self.event("progress", done=done, total=total, unit=unit, **figures)
        if done >= total or now - self._last_line >= LOG_EVERY:
            self._last_line = now
            print(f"{done}/{total} {unit}", *(f"{k} {v:.6g}" for k, v in figures.items()), sep="  ", flush=True)

    def metric(self, step: int, **values: float) -> None:
        with self._lock:
            self._metrics.write(json.dumps({"time": time.time(), "step": step, **values}) + "\n")

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.event("note", text=text)

    def product(self, name: str, folder: Path) -> None:
        self.seal_product(name, folder)

    def abandon(self, text: str) -> NoReturn:
        self.fail(Failure(text))

    def fail(self, failure: Failure) -> NoReturn:
        """What `abandon` does, with the kind of the failure."""
        if not self.ending.acquire(blocking=False):
            sys.exit()  # in any thread but the main one this ends that thread only
        # In a thread with a deadline, so that whatever else hangs, the process goes.
        last = threading.Thread(target=self.record_abandoned, args=(failure,), name="abandon", daemon=True)
        last.start()
        last.join(ABANDON_SECONDS)
        os._exit(1)

    def end(self, outcome: str | Failure) -> None:
        """The last event. On a full disk it waits a while: room comes when stages that fail remove what they made."""
        values = (
            {"outcome": outcome.text, "kind": outcome.kind} if isinstance(outcome, Failure) else {"outcome": outcome}
        )
        deadline, write = time.monotonic() + ROOM_SECONDS, partial(self.event, "end", **values)
        while True:
            try:
                return write()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                write = partial(self._events.flush)  # the line stays in the buffer
                time.sleep(0.1)

    def close(self) -> None:
        self._events.close()
        self._metrics.close()


class FollowerReport:
    """The Report of a rank other than 0: notes go to its own log, and nothing is kept, since rank 0 speaks for all."""

    def __init__(self, fail: Callable[[Failure], object] = lambda failure: None) -> None:
        self.fail = fail
        """What ends this rank, and dismisses the others; the worker sets it."""

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None: ...

    def metric(self, step: int, **values: float) -> None: ...

    def note(self, text: str) -> None:
        print(text, flush=True)

    def product(self, name: str, folder: Path) -> None: ...

    def abandon(self, text: str) -> NoReturn:
        os.write(2, f"{text}\n".encode())  # not `print`, whose lock the thread that hangs may hold
        self.fail(Failure(text))
        os._exit(1)


class Tail:
    """Reads the whole lines that were appended to a JSONL file since the last call; a missing file is empty."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offset)
                data = f.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self.offset += end
        return [json.loads(line) for line in data[:end].splitlines()]
