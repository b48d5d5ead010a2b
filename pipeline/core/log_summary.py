"""Summaries of events.jsonl and metrics.jsonl, so that the status of a run costs the same for any length of its logs.

The running stage keeps `events.summary.json` and `metrics.summary.json` beside its logs. A summary has the state after
the first `offset` bytes of its log, and readers continue from there. The log is the only truth: a summary that is
missing, damaged or of another log costs the time of reading the log, and changes no result. Readers write nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import threading
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar, cast

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.events import (
    EVENT,
    POINT,
    Event,
    Number,
    Other,
    Point,
    Progress,
    Start,
    Tail,
    curves_of,
    is_known,
)
from pipeline.core.json_files import Damaged

# The bytes of a log that are in memory at a time.
CHUNK = 2**20
# The bytes before `offset` whose hash shows that a summary is of this log.
PROOF = 4096
# The reports of progress from which the step time is computed.
PACE = 65
# The points of a curve, and the curves of a stage.
POINTS, MAX_CURVES = 150, 64
SAVE_EVERY = 10.0
# Seconds that the last save may take: the other ranks of a failed launch end within five.
LAST_SECONDS = 2.0

Count = Annotated[int, Field(ge=0, lt=2**63)]
Row = TypeVar("Row")
State = TypeVar("State")


class _Saved(TypedDict, Generic[State]):
    """The content of a summary: the state after the first `offset` bytes of a log."""

    offset: Count
    proof: str
    state: State


class LogSummary(ABC, Generic[Row]):
    """The state of a log up to its last complete line. A subclass defines the state and how a line changes it."""

    log: ClassVar[str]
    line: ClassVar[TypeAdapter[Any]]
    body: ClassVar[TypeAdapter[Any]]

    def __init__(self, folder: Path) -> None:
        """Reads the summary in a node's folder, and then the rest of the log."""
        log = folder / self.log
        self.path = log.with_suffix(".summary.json")
        self.state: Any = self.empty()
        offset = 0
        # A summary of another log, or of one that was written anew, does not count.
        saved = json_files.read_optional(self.path, self.body, "the log beside it is read whole")
        if saved and _proof(log, saved["offset"]) == saved["proof"]:
            self.state, offset = saved["state"], saved["offset"]
        self.saved = offset
        self.tail: Tail[Row] = Tail(log, self.line, offset, chunk=CHUNK)
        self.read()

    @abstractmethod
    def empty(self) -> Any:
        """Returns the state before the first line."""

    @abstractmethod
    def add(self, row: Row) -> None:
        """Adds a line to the state."""

    def read(self) -> None:
        """Adds the lines that were appended since."""
        while True:
            for row in self.tail.read():
                self.add(row)
            if not self.tail.has_more:
                return

    def save(self) -> None:
        """Writes the summary, atomically, if the log has grown. Raises OSError."""
        if self.tail.offset == self.saved:
            return
        body = {"offset": self.tail.offset, "proof": _proof(self.tail.path, self.tail.offset), "state": self.state}
        atomic_files.write(self.path, json.dumps(body, allow_nan=False, separators=(",", ":")))
        self.saved = self.tail.offset


def _proof(log: Path, offset: int) -> str | None:
    """Returns the hash of the last bytes before an offset; None if the log is shorter or cannot be read."""
    length = min(offset, PROOF)
    try:
        with json_files.open_file(log) as file:
            file.seek(offset - length)
            data = file.read(length)
    except (Damaged, OSError):  # whoever reads the log reports it
        return None
    return hashlib.sha256(data).hexdigest() if len(data) == length else None


class EventState(TypedDict):
    """The state of a stage by its events."""

    attempts: Count
    # The folder of messages of the latest attempt, and when it began; null once it has ended.
    launch: str
    began: Number | None
    # Seconds of all attempts before.
    ran: Number
    # The number of all starts, and the latest.
    starts: Count
    start: Start | None
    # The first progress since the latest start, and the latest.
    first: Progress | None
    progress: Progress | None
    last: Event | None
    # [time, done] of the latest progress since the start.
    pace: list[list[Number]]
    # The sentence on the slow rank, and since when there is one.
    slow: str | None
    slow_since: Number | None


class EventSummary(LogSummary[Event | Other]):
    log = "events.jsonl"
    line = EVENT
    body = TypeAdapter(_Saved[EventState])
    state: EventState

    def empty(self) -> EventState:
        nothing = {name: None for name in ("began", "start", "first", "progress", "last", "slow", "slow_since")}
        lists: dict[str, Any] = {name: [] for name in ("pace",)}
        return cast(EventState, {"attempts": 0, "launch": "", "ran": 0.0, "starts": 0, **nothing, **lists})

    def add(self, row: Event | Other) -> None:
        state = self.state
        if not is_known(row):
            return
        event = cast(Event, row)
        if event["event"] == "attempt":
            state["attempts"] += 1
            state["launch"] = event.get("launch", "")
            self._begin(event["time"])
        elif event["event"] == "start":
            # A job announces an attempt before the stage starts; on this machine, the start is all there is.
            announced = state["began"] is not None
            if not announced or (state["start"] and state["start"]["time"] >= cast(float, state["began"])):
                self._begin(event["time"])
            state["starts"] += 1
            state["start"], state["first"], state["pace"] = event, None, []
            state["slow"] = state["slow_since"] = None
        elif event["event"] == "progress":
            state["first"] = state["first"] or event
            state["progress"] = event
            state["pace"] = [*state["pace"], [event["time"], event["done"]]][-PACE:]
        elif event["event"] == "slow_rank":
            state["slow"] = event["text"]
            state["slow_since"] = None if event["text"] is None else state["slow_since"] or event["time"]
        elif event["event"] == "end":
            state["ran"], state["began"] = self.seconds(event["time"]) or 0.0, None
        state["last"] = event

    def _begin(self, now: float) -> None:
        """Begins an attempt. The one before may have been killed, and then its last event is its end."""
        state = self.state
        state["ran"] = self.seconds() or 0.0
        state["began"] = now

    def seconds(self, now: float | None = None) -> float | None:
        """Returns the seconds of all attempts together; None without one.

        Args:
            now: The time at which the present attempt is looked at; None: that of its last event.
        """
        began, last = self.state["began"], self.state["last"]
        if began is None:
            return self.state["ran"] or None
        if now is None:
            now = last["time"] if last else began
        return self.state["ran"] + max(0.0, now - began)

    def eta(self) -> float | None:
        """Returns the remaining seconds at the pace of the present attempt; None if it is too early for an estimate."""
        first, last = self.state["first"], self.state["progress"]
        if first is None or last is None or last["done"] <= first["done"]:
            return None
        pace = (last["time"] - first["time"]) / (last["done"] - first["done"])
        return round(float(max(0, last["total"] - last["done"]) * pace), 1)

    def step_seconds(self) -> float | None:
        """Returns the median time of a step, or of another unit, in the latest reports of progress.

        Returns None if it is unknown.
        """
        times = [
            (after[0] - before[0]) / (after[1] - before[1])
            for before, after in pairwise(self.state["pace"])
            if after[1] > before[1]
        ]
        return statistics.median(times) if times else None


# [first step, points, their sum, the smallest, the largest]
Bucket = Annotated[list[Number], Field(min_length=5, max_length=5)]


class Curve(TypedDict):
    """A metric by steps, in buckets of `width` steps."""

    width: Annotated[int, Field(ge=1, lt=2**63)]
    buckets: list[Bucket]


class CurveState(TypedDict):
    """The state of the curves of a stage."""

    curves: dict[str, Curve]


class Curves(LogSummary[Point]):
    """The curves of a stage, each thinned to at most `POINTS` buckets.

    After a restart, the steps that are trained again replace the former ones.
    """

    log = "metrics.jsonl"
    line = POINT
    body = TypeAdapter(_Saved[CurveState])
    state: CurveState

    def empty(self) -> CurveState:
        return {"curves": {}}

    def add(self, row: Point) -> None:
        step, curves = row["step"], self.state["curves"]
        for name, value in curves_of(row).items():
            if not (math.isfinite(value) and 0 <= step < 2**53 and abs(value) <= 1e15):
                continue
            if name in curves or len(curves) < MAX_CURVES:
                _add_point(curves.setdefault(name, {"width": 1, "buckets": []}), step, value)

    def points(self, name: str) -> list[tuple[float, float, float, float]]:
        """Returns (step, mean, smallest, largest) of each bucket of a curve."""
        curve = self.state["curves"].get(name)
        return [(step, total / n, low, high) for step, n, total, low, high in (curve["buckets"] if curve else ())]

    def count(self, name: str) -> int:
        """Returns the number of points of a curve."""
        curve = self.state["curves"].get(name)
        return int(sum(bucket[1] for bucket in curve["buckets"])) if curve else 0


def _add_point(curve: Curve, step: int, value: float) -> None:
    # Six digits are enough for a curve, and keep the summary small.
    buckets, width, short = curve["buckets"], curve["width"], float(f"{value:.6g}")
    # A step before the last bucket is trained again after a restart, so later points are out of date.
    while buckets and buckets[-1][0] // width > step // width:
        buckets.pop()
    _append(buckets, [step, 1, short, short, short], width)
    # Buckets of twice the width halve their number, so a curve of any length has a bounded size.
    if len(buckets) > POINTS:
        curve["width"], curve["buckets"] = 2 * width, []
        for bucket in buckets:
            _append(curve["buckets"], bucket, 2 * width)


def _append(buckets: list[list[float]], bucket: list[float], width: int) -> None:
    """Appends a bucket, or merges it with the last one if both are of the same `width` steps."""
    if buckets and buckets[-1][0] // width == bucket[0] // width:
        buckets[-1] = _merge(buckets[-1], bucket)
    else:
        buckets.append(bucket)


def _merge(first: list[float], second: list[float]) -> list[float]:
    (step, n, total, low, high), (_, m, further, lower, higher) = first, second
    return [step, n + m, float(f"{total + further:.9g}"), min(low, lower), max(high, higher)]


class SummaryWriter:
    """Saves the summaries of a running stage every `SAVE_EVERY` seconds, from a thread, until `close`.

    No error of it reaches the stage: a summary that is old costs only the time of reading the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._summaries: list[LogSummary[Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="summaries", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        # The logs are read in this thread, not in the one that runs the stage. After `close`, it saves once more.
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SAVE_EVERY)
            try:
                self._summaries = self._summaries or [EventSummary(self.folder), Curves(self.folder)]
                for summary in self._summaries:
                    summary.read()
                    summary.save()
            except Exception as error:  # whatever it is, it must not end the stage
                print(f"the summaries are not up to date ({error}); the stage goes on", file=sys.stderr, flush=True)
                return

    def close(self) -> None:
        """Saves once more, unless that takes too long."""
        self._stop.set()
        self._thread.join(LAST_SECONDS)
