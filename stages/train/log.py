"""training.jsonl, the log of a phase by step, without times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from pipeline.core.errors import AtomError, MachineError
from stages.train.checkpoint.work_checkpoint import SUPERSEDED
from stages.train.log_replay import LogReplay


class Log:
    """training.jsonl: one line for each step and each held-out evaluation, in order, without times."""

    def __init__(self, path: Path, is_writer: bool) -> None:
        self.path, self.is_writer = path, is_writer
        self.replay = LogReplay([])
        """The lines of an earlier attempt that the next ones are compared with."""

    def create(self) -> None:
        """Creates an empty log."""
        if self.is_writer:
            self.path.write_bytes(b"")

    def check(self, step: int, first: int) -> None:
        """Raises AtomError if the log of a checkpoint does not have every step from `first` to `step`."""
        if self.is_writer:
            steps = [x["step"] for x in self.lines() if "tokens" in x]
            if steps != list(range(first, step + 1)):
                raise AtomError(f"{self.path} does not hold the steps {first} to {step} one by one; "
                                f"remove {self.path.parent.parent} to start this stage anew")  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in self.path.read_text().splitlines()]

    def write(self, values: dict[str, Any]) -> None:
        if self.is_writer:
            with self._open() as file:
                file.write(json.dumps(values, sort_keys=True) + "\n")
            self.replay.compare(values)

    def flush(self) -> None:
        """Flushes the log to disk, because a checkpoint requires the lines before it."""
        if self.is_writer:
            with self._open() as file:
                os.fsync(file.fileno())

    def _open(self) -> TextIO:
        """Opens the log. Raises AtomError if its folder is missing, which only a later attempt removes."""
        try:
            return open(self.path, "a")
        except FileNotFoundError:
            raise MachineError(SUPERSEDED) from None
