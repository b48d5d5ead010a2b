"""The record of a start of a training phase: where it began, on what, and how its first steps compare with the log.

    <work>/starts/0002.json     of the start whose lease has the number 2

After a kill, the log of the attempt before has lines of steps that are trained again, because its last work checkpoint
is older. They are the control: each new line is compared with the lost one. A deviation is named in the log and in the
record, and training goes on with the new line, which is the only one that is published. A start after a clean stop has
no such lines, and replays nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.provenance import Deviation, Replayed

FOLDER = "starts"
MOST_DEVIATIONS = 10
"""Deviations that are named one by one; `deviating` counts all."""


def path_of(work: Path, lease: int | None) -> Path:
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
        """first, last: of the steps that the earlier attempt had finished after the checkpoint, None without any.
        lines: compared so far."""
        first, last = (self.steps[0], self.steps[-1]) if self.steps else (None, None)
        return {
            "first": first, "last": last, "lines": self.compared, "deviating": self.deviating,
            "deviations": self.deviations,
        }  # fmt: skip

    def sentence(self) -> str:
        """What the comparison of at least one step gave."""
        span = f"steps {self.steps[0]} to {self.steps[-1]}"
        if not self.deviating:
            return f"{span} came out as in the log of the attempt before: {self.compared} lines, each equal"
        row = self.deviations[0]
        name, (before, now) = next(iter(row["fields"].items()))
        return (
            f"{span} deviate from the log of the attempt before in {self.deviating} of {self.compared} lines, first at "
            f"step {row['step']}: {name} was {before}, is {now}; training goes on with the new values"
        )


def write(path: Path, restored_step: int | None, device: Mapping[str, Any], replay: LogReplay) -> None:
    """restored_step: of the work checkpoint; None if the phase begins."""
    body = {"restored_step": restored_step, "device": dict(device), "replayed": replay.record()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, json.dumps(body, sort_keys=True) + "\n")
