"""training.jsonl, the log of a phase by step, without times; and the record of each start of the phase.

    <work>/starts/0002.json     of the start whose lease has the number 2

After a kill, the log of the attempt before has lines of steps that are trained again, because its last work checkpoint
is older. They are the control: each new line is compared with the lost one. A deviation is named in the log and in the
record, and training goes on with the new line, which is the only one that is published. A start after a clean stop has
no such lines, and replays nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, MachineError
from pipeline.core.provenance import Deviation, Replayed
from stages.train.checkpoint.work_checkpoint import SUPERSEDED

FOLDER = "starts"
MOST_DEVIATIONS = 10
"""Deviations that are named one by one; `deviating` counts all."""


class Log:
    """The file training.jsonl, with a line for each step and each held-out evaluation, in order, without times."""

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
            # A log of another attempt, or an edited one, would pass for the record of these steps.
            if steps != list(range(first, step + 1)):
                raise AtomError(
                    f"{self.path} does not hold the steps {first} to {step} one by one; "
                    f"remove {self.path.parent.parent} to start this stage anew"
                )

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


def finite_or_none(value: float) -> float | None:
    """Returns the value, or None (JSON's null) if it is not finite."""
    return value if math.isfinite(value) else None


def start_path(work: Path, lease: int | None) -> Path:
    return work / FOLDER / f"{lease or 1:04d}.json"


class LogReplay:
    """The comparison of new lines of a log with those that an earlier attempt had written after the checkpoint.

    lines: the earlier ones, in order. done: called once, after the last of them was compared.
    """

    def __init__(self, lines: list[dict[str, Any]], done: Callable[[], None] = lambda: None) -> None:
        self.lines, self.done = lines, done
        self.steps = sorted({line["step"] for line in lines})
        self.compared, self.deviating = 0, 0
        self.deviations: list[Deviation] = []

    @property
    def active(self) -> bool:
        return self.compared < len(self.lines)

    def compare(self, line: Mapping[str, Any]) -> None:
        """Compares the next line. Equal means equal as JSON, so bit for bit."""
        if not self.active:
            return
        logged = self.lines[self.compared]
        self.compared += 1
        # As it is written: tuples become lists, and floats their shortest text.
        now = json.loads(json.dumps(line))
        names = sorted(name for name in {*logged, *now} if logged.get(name) != now.get(name))
        if names:
            self.deviating += 1
            fields = {name: [logged.get(name), now.get(name)] for name in names}
            if len(self.deviations) < MOST_DEVIATIONS:
                self.deviations.append({"step": now.get("step"), "fields": fields})
        if not self.active:
            self.done()

    def stop(self) -> None:
        """Ends the comparison: after a rewind the steps come in another order."""
        self.lines = self.lines[: self.compared]

    def record(self) -> Replayed:
        """The comparison so far, for the record of the start.

        `first` and `last` are of the steps that the earlier attempt had finished after the checkpoint, None without
        any. `lines` are those compared so far.
        """
        first, last = (self.steps[0], self.steps[-1]) if self.steps else (None, None)
        return {
            "first": first,
            "last": last,
            "lines": self.compared,
            "deviating": self.deviating,
            "deviations": self.deviations,
        }

    def sentence(self) -> str:
        """Returns the result of the comparison of at least one step, in words."""
        span = f"steps {self.steps[0]} to {self.steps[-1]}"
        if not self.deviating:
            return f"{span} came out as in the log of the attempt before: {self.compared} lines, each equal"
        row = self.deviations[0]
        name, (before, now) = next(iter(row["fields"].items()))
        return (
            f"{span} deviate from the log of the attempt before in {self.deviating} of {self.compared} lines, first at "
            f"step {row['step']}: {name} was {before}, is {now}; training goes on with the new values"
        )


def write_start(path: Path, restored_step: int | None, device: Mapping[str, Any], replay: LogReplay) -> None:
    """Writes the record of a start; `restored_step` is the work checkpoint's, or None if the phase begins."""
    body = {"restored_step": restored_step, "device": dict(device), "replayed": replay.record()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, json.dumps(body, sort_keys=True) + "\n")
