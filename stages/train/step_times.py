"""The time of each rank's steps: waiting for data, waiting for other ranks, and computing; and the rank that is slow.

Ranks wait for each other in every step, so all of them take as long as the slowest. It is the one that waits least: it
comes last to each collective. A rank measures the waits for its collectives where torch.distributed waits, in
`Work.wait`: by the clock on a CPU, by events of the stream on a GPU. Events are read once they have passed, without
a synchronization. Every few steps the ranks exchange three numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pipeline.core.environment import node_name

INTERVAL = 5
"""Steps from one exchange to the next: a rank that becomes slow is named within two intervals."""
SLOWER = 1.2
"""A slow rank is busy so many times as long as its peers, …"""
COST = 0.1
"""… and that much of a step longer."""


@dataclass
class Waits:
    """This process's waits for collectives. A thread that hangs in one is seen by the others."""

    seconds: float = 0.0
    number: int = 0
    """Collectives that this rank has waited for, the present one included."""
    since: float | None = None
    """The time at which the present wait began; None while the rank is in no collective."""
    ended: float = field(default_factory=time.monotonic)
    """The time at which the last wait ended."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def take(self) -> float:
        """Seconds since the last call. Waits on a GPU that have not passed yet are left to the next call."""
        # An event that has not passed would have to be waited for, which stalls the host.
        passed = {pair for pair in self.events if pair[1].query()}
        self.events = [pair for pair in self.events if pair not in passed]
        seconds, self.seconds = self.seconds + sum(a.elapsed_time(b) for a, b in passed) / 1000, 0.0
        return float(seconds)

    def place(self, rank: int) -> Place:
        now, since = time.monotonic(), self.since
        return Place(rank, node_name(), since is not None, self.number, now - (self.ended if since is None else since))


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a hang.

    number: of collectives that it has waited for. seconds: for which it stands in the last of them, or after it.
    """

    rank: int
    node: str
    in_collective: bool
    number: int
    seconds: float


def first_missing(places: list[Place]) -> str:
    """The rank for which the others wait, in words.

    It is one that is in no collective, or, if all are in one, that with the fewest.
    """
    # A rank outside of any collective is the one for which the others wait.
    outside = [place for place in places if not place.in_collective]
    if outside:
        first = max(outside, key=lambda place: place.seconds)
        return (
            f"rank {first.rank} on {first.node} did not arrive: it left its last collective {first.seconds:.0f} s ago"
        )
    # All are inside: the one with the fewest is in an earlier collective than the others.
    first = min(places, key=lambda place: place.number)
    return f"all ranks are in a collective, rank {first.rank} on {first.node} in the earliest ({first.number})"


WAITS = Waits()


@contextmanager
def measured_waits() -> Iterator[Waits]:
    """Measures the waits of this process for collectives within the context."""
    original = dist.Work.wait
    vars(WAITS).update(vars(Waits()))  # another phase of this process may have left its own

    def wait(work: dist.Work, *arguments: Any, **options: Any) -> bool:
        # On a GPU `wait` returns at once, and the stream waits: only events show for how long.
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        pair = None
        if on_gpu and not torch.cuda.is_current_stream_capturing():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
        WAITS.number, WAITS.since = WAITS.number + 1, time.monotonic()
        try:
            return bool(original(work, *arguments, **options))
        finally:
            WAITS.ended = time.monotonic()
            if pair is not None:
                pair[1].record()
                WAITS.events.append(pair)
            elif not on_gpu:
                WAITS.seconds += WAITS.ended - WAITS.since
            WAITS.since = None

    dist.Work.wait = wait  # type: ignore[method-assign,assignment]
    try:
        yield WAITS
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class RankTime:
    """Seconds of one rank in the steps of an interval.

    `position` is that of its pipeline stage; ranks of one position do the same work.
    """

    rank: int
    node: str
    position: int
    wall: float
    data: float
    communication: float

    @property
    def busy(self) -> float:
        """Seconds in which the rank did not wait for others."""
        return max(0.0, self.wall - self.communication)

    @property
    def compute(self) -> float:
        return max(0.0, self.busy - self.data)


@dataclass(frozen=True)
class Slow:
    """A slow rank: how many times as long as its peers it is busy, and whether it waits for data."""

    time: RankTime
    times: float
    reads: bool

    def sentence(self, step: int) -> str:
        cause = "waits for data" if self.reads else "computes"
        place = f"rank {self.time.rank} on {self.time.node}"
        return f"{place} {cause} {self.times:.1f} times as long as its peers since step {step}"


def slow_rank(times: list[RankTime]) -> Slow | None:
    """The rank for which the others wait, if any: of those of one position, compared with the faster half of them."""
    slowest: Slow | None = None
    for position in {each.position for each in times}:
        peers = [each for each in times if each.position == position]
        worst = max(peers, key=lambda each: each.busy)
        # The faster half, so that with two ranks the slow one is not its own measure.
        usual = statistics.median_low(each.busy for each in peers)
        excess = worst.busy - usual
        if len(peers) > 1 and worst.busy > SLOWER * usual and excess > COST * worst.wall:
            reads = worst.data - statistics.median_low(each.data for each in peers) > excess / 2
            slow = Slow(worst, worst.busy / max(usual, 1e-9), reads)
            slowest = max(filter(None, (slowest, slow)), key=lambda each: each.times)
    return slowest


class StepTimes:
    """The times of this rank's steps. gather: exchanges a value between all ranks. position: of the rank's stage."""

    def __init__(self, waits: Waits, rank: int, position: int, gather: Callable[[RankTime], list[RankTime]]) -> None:
        self.waits, self.rank, self.position, self.gather = waits, rank, position, gather
        self.wall = self.data = self.communication = 0.0
        self.steps = -1
        """Measured steps since the last exchange. The first step does not count."""

    @contextmanager
    def step(self, data: Callable[[], float]) -> Iterator[None]:
        """Measures a step. What happens between steps, such as checkpoints of rank 0, does not count.

        data: called at the end of the step for the seconds for which it waited for data.
        """
        # Waits before the step, such as those of a checkpoint, are dropped.
        self.waits.take()
        started = time.monotonic()
        yield
        wall, communication = time.monotonic() - started, self.waits.take()
        self.steps += 1
        if self.steps:
            self.wall, self.communication = self.wall + wall, self.communication + communication
            self.data += data()

    def exchange(self) -> list[RankTime] | None:
        """The mean times of all ranks since the last exchange; None if it is not yet due. Collective."""
        if self.steps < INTERVAL:
            return None
        seconds = [total / self.steps for total in (self.wall, self.data, self.communication)]
        self.wall = self.data = self.communication = 0.0
        self.steps = 0
        return self.gather(RankTime(self.rank, node_name(), self.position, *seconds))


def metrics(times: list[RankTime]) -> dict[str, float]:
    """The curves of an exchange: of the rank that is busy longest, and of the usual one."""
    slowest = max(times, key=lambda each: each.busy)
    return {
        "slowest_rank": float(slowest.rank),
        "slowest_compute_seconds": slowest.compute,
        "slowest_data_seconds": slowest.data,
        "slowest_communication_seconds": slowest.communication,
        "median_compute_seconds": statistics.median(each.compute for each in times),
        "median_data_seconds": statistics.median(each.data for each in times),
        "median_communication_seconds": statistics.median(each.communication for each in times),
    }
