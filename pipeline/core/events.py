"""A stage's report as files: `events.jsonl` (state and progress) and `metrics.jsonl` (curves).

The files are authoritative and MLflow is filled from them, so a dead tracking server never stops a stage.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, NotRequired, TypeVar, cast

from pydantic import Discriminator, Field, FiniteFloat, Tag, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files
from pipeline.core.errors import Failure
from pipeline.core.json_files import Damaged
from pipeline.core.store import sha256_file

# Seconds between two events of progress, and between two lines of it in the log.
PROGRESS_EVERY = 0.5
LOG_EVERY = 10.0
# Seconds for which a thread waits for another one that writes, which may hang.
LOCK_SECONDS = 2.0
# Seconds in which an abandoned attempt must be recorded before its process exits.
ABANDON_SECONDS = 30.0
# Seconds in which a full disk may get room for the last event.
ROOM_SECONDS = 10.0


class FileReport:
    """The Report of a running stage, appending to the node's folder under `logs/<run>/`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = open(folder / "events.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close())
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()
        self._metrics_ended = False
        self._last_progress = self._last_line = 0.0
        self.figures: dict[str, float] = {}
        # Set by the worker once it holds the lease.
        self.lease: int | None = None
        # Set by the worker.
        self.planned_tokens_per_s = 0.0
        # Acquired and never released by the thread that ends the attempt: the main thread, or the one that abandons it.
        self.ending = threading.RLock()
        # Ends the attempt in place of the main thread; the worker sets it.
        self.record_abandoned: Callable[[Failure], None] = lambda failure: None
        # Seals a checkpoint as an artifact of its own; the worker sets it.
        self.checkpoint_sealer: Callable[[int, Path], None] = lambda step, folder: None

    def event(self, kind: str, /, **values: Any) -> None:
        line = json.dumps({"time": time.time(), "event": kind, **values}) + "\n"
        # A thread that hangs while it writes must not block the others.
        locked = self._lock.acquire(timeout=LOCK_SECONDS)
        try:
            self._events.write(line)
        finally:
            if locked:
                self._lock.release()

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        self.figures.update(figures)
        current_time = time.monotonic()
        if done >= total or current_time - self._last_progress >= PROGRESS_EVERY:
            self._last_progress = current_time
            self.event("progress", done=done, total=total, unit=unit, **figures)
        if done >= total or current_time - self._last_line >= LOG_EVERY:
            self._last_line = current_time
            print(f"{done}/{total} {unit}", *(f"{k} {v:.6g}" for k, v in figures.items()), sep="  ", flush=True)

    def metric(self, step: int, **values: float) -> None:
        with self._lock:
            if not self._metrics_ended:
                self._metrics.write(json.dumps({"time": time.time(), "step": step, **values}) + "\n")

    def end_metrics(self) -> str:
        """Ends the metrics, before the statement about the product. Returns the SHA-256 that it names."""
        with self._lock:
            self._metrics_ended = True
            self._metrics.flush()
            return sha256_file(Path(self._metrics.name))

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.event("note", text=text)

    def slow_rank(self, text: str | None) -> None:
        print(text or "no rank is slow any longer", flush=True)
        self.event("slow_rank", text=text)

    def seal_checkpoint(self, step: int, folder: Path) -> None:
        self.checkpoint_sealer(step, folder)

    def abandon(self, text: str) -> NoReturn:
        self.fail(Failure(text))

    def fail(self, failure: Failure) -> NoReturn:
        """Has the failure recorded and ends the process, from any thread: `abandon` for a failure of any kind."""
        if not self.ending.acquire(blocking=False):
            sys.exit()  # in any thread but the main one this ends that thread only
        # The outcome is recorded in a thread with a deadline, so that the process ends even if something hangs.
        ending_thread = threading.Thread(target=self.record_abandoned, args=(failure,), name="abandon", daemon=True)
        ending_thread.start()
        ending_thread.join(ABANDON_SECONDS)
        os._exit(1)

    def end(self, outcome: str | Failure) -> None:
        """Writes the last event."""
        values: dict[str, Any] = {"outcome": outcome}
        if isinstance(outcome, Failure):
            values = {"outcome": outcome.text, "kind": outcome.kind}
        # On a full disk it waits a while, because failing stages free space when they remove their drafts.
        deadline = time.monotonic() + ROOM_SECONDS
        write = partial(self.event, "end", **values)
        while True:
            try:
                write()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                write = partial(self._events.flush)  # the line stays in the buffer
                time.sleep(0.1)

    def close(self) -> None:
        self._events.close()
        self._metrics.close()


class FollowerReport:
    """The Report of a rank other than 0.

    Notes go to the log of the rank. Progress and metrics are dropped, because rank 0 reports them.
    """

    def __init__(self, lease: int, fail: Callable[[Failure], object]) -> None:
        self.lease: int | None = lease
        self.planned_tokens_per_s = 0.0
        # Ends this rank and dismisses the others; the worker sets it.
        self.fail = fail

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None: ...

    def metric(self, step: int, **values: float) -> None: ...

    def note(self, text: str) -> None:
        print(text, flush=True)

    def slow_rank(self, text: str | None) -> None: ...

    def seal_checkpoint(self, step: int, folder: Path) -> None: ...

    def abandon(self, text: str) -> NoReturn:
        os.write(2, f"{text}\n".encode())  # not `print`: the hanging thread may hold its lock
        self.fail(Failure(text))
        os._exit(1)


Number = Annotated[FiniteFloat, Field(ge=-1e15, le=1e15)]


class _Event(TypedDict):
    # In seconds since the epoch.
    time: Number


class Attempt(_Event):
    """A job has started."""

    event: Literal["attempt"]
    # The name of the folder with the messages of its ranks.
    launch: NotRequired[str]


class Start(_Event):
    """The attempt holds the lease, and the stage begins."""

    event: Literal["start"]
    pid: int  # of rank 0
    ranks: int
    gpus: NotRequired[int]  # allotted ones


class Progress(_Event):
    """The progress of the stage. Figures are further fields: see `figures_of`."""

    event: Literal["progress"]
    done: Number
    total: Number
    unit: str


class Note(_Event):
    """A line for people, which is in the log too."""

    event: Literal["note"]
    text: str


class SlowRank(_Event):
    """A rank is slow, or none is any longer."""

    event: Literal["slow_rank"]
    text: str | None  # names the rank; null: none is slow


class UsageEvent(_Event):
    """The usage of a whole attempt."""

    event: Literal["usage"]
    wall_seconds: Number
    energy_joules_estimate: NotRequired[Number]


class End(_Event):
    """The end of the attempt."""

    event: Literal["end"]
    outcome: str  # `sealed`, `busy`, or the sentence of a failure
    kind: NotRequired[str | None]  # of a failure


class Other(_Event):
    """An event of a kind that this module does not read."""

    event: str


# A line of events.jsonl of a known kind.
Event = Attempt | Start | Progress | Note | SlowRank | UsageEvent | End


def figures_of(event: Progress) -> dict[str, float]:
    """Returns the figures of an event of progress, such as loss and tokens_per_s."""
    return _further_numbers(event, Progress)


def _further_numbers(row: Mapping[str, object], kind: type) -> dict[str, float]:
    """Returns the numbers of a row outside the fields of its kind."""
    return {
        name: value
        for name, value in row.items()
        if name not in kind.__annotations__ and isinstance(value, (int, float))
    }


def _kind(row: Any) -> str:
    kind = row.get("event") if isinstance(row, dict) else None
    return kind if kind in ("attempt", "start", "progress", "note", "slow_rank", "usage", "end") else "other"


def is_known(row: Mapping[str, object]) -> bool:
    """Returns True if an event is of a kind that this module knows."""
    return _kind(row) != "other"


EVENT: TypeAdapter[Event | Other] = TypeAdapter(
    Annotated[
        Annotated[Attempt, Tag("attempt")]
        | Annotated[Start, Tag("start")]
        | Annotated[Progress, Tag("progress")]
        | Annotated[Note, Tag("note")]
        | Annotated[SlowRank, Tag("slow_rank")]
        | Annotated[UsageEvent, Tag("usage")]
        | Annotated[End, Tag("end")]
        | Annotated[Other, Tag("other")],
        Discriminator(_kind),
    ]
)


class Point(TypedDict):
    """A line of metrics.jsonl: one point of each curve in `curves_of`."""

    time: Number
    step: int


def curves_of(point: Point) -> dict[str, float]:
    """Returns the values of a point by the names of their curves."""
    return _further_numbers(point, Point)


POINT: TypeAdapter[Point] = TypeAdapter(Point)
Row = TypeVar("Row")
# The longest accepted line, in bytes.
LINE = 2**20
# The most bytes that one call of `Tail.read` reads. That many events take days.
ONE_READ = 64 * 2**20


class Tail(Generic[Row]):
    """Reads the complete lines that were appended to a JSONL file since the last call; a missing file is empty.

    Damaged lines are reported and skipped.

    Args:
        path: The file.
        kind: The type of a line.
        offset: The first byte to read.
        whole: Of more than `ONE_READ` new bytes, a call reads the first, and the next call continues. Otherwise, it
            reads only the last.
        chunk: A call reads no more bytes than that, and the next call continues.
    """

    def __init__(
        self, path: Path, kind: TypeAdapter[Row], offset: int = 0, whole: bool = False, chunk: int | None = None
    ) -> None:
        self.path, self.offset, self.kind, self.whole = path, offset, kind, whole
        self.chunk = ONE_READ if chunk is None else chunk
        # True if bytes follow the last complete line: a line that is being written, or that was cut.
        self.cut = False
        # True if another call would read further lines at once.
        self.has_more = False

    def read(self) -> list[Row]:
        """Returns the lines since the last call."""
        rows: list[Row] = []
        self.has_more = False
        try:
            with json_files.open_file(self.path) as file:
                last_bytes_offset = os.fstat(file.fileno()).st_size - ONE_READ
                skips_bytes = last_bytes_offset > self.offset and not self.whole
                if skips_bytes:
                    name = json_files.printable(self.path)
                    json_files.note(f"{name} has more than {ONE_READ:,} bytes; only the last ones are read")
                    self.offset = last_bytes_offset
                file.seek(self.offset)
                end_offset = self.offset + self.chunk
                if skips_bytes:
                    file.readline(ONE_READ)  # the rest of a line

                is_at_end = False
                while file.tell() < end_offset and (line := file.readline(LINE)):
                    self.cut = not line.endswith(b"\n")
                    if self.cut and len(line) < LINE:
                        is_at_end = True
                        break
                    # A longer line than LINE is skipped piece by piece, so that it is never in memory as a whole.
                    is_too_long = self.cut
                    while self.cut and file.tell() < end_offset and (remainder := file.readline(LINE)):
                        self.cut = not remainder.endswith(b"\n")
                    location = f"the line that ends at byte {file.tell():,}: "
                    self.offset = file.tell()
                    try:
                        if is_too_long:
                            raise Damaged(self.path, f"{location}it is too long")
                        rows.append(json_files.parse(line, self.path, self.kind, location))
                    except Damaged as error:
                        json_files.report(error, "the other lines count")
                # A line that is too long may go on after the last byte that was read here.
                self.has_more = file.tell() >= end_offset and not is_at_end
        except FileNotFoundError:
            pass
        except Damaged as error:
            json_files.report(error, "what it says is not known")
        except OSError as error:
            json_files.report(Damaged(self.path, str(error.strerror)), "what it says is not known")
        return rows


class EventTail(Tail[Event]):
    """A Tail of an events.jsonl: the events of known kinds."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, cast(TypeAdapter[Event], EVENT))  # other kinds are skipped below

    def read(self) -> list[Event]:
        return [event for event in super().read() if is_known(event)]
