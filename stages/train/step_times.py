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
"""A rank is slow only if it is busy more than this many times as long as its peers."""
COST = 0.1
"""A rank is slow only if it is busy longer than its peers by more than this part of its steps."""


@dataclass
class Waits:
    """This process's waits for collectives. A thread that hangs in one is seen by the others."""

    seconds: float = 0.0
    """Seconds of the waits on a CPU since the last `take`."""
    number: int = 0
    """Collectives that this rank has waited for, the present one included."""
    since: float | None = None
    """The time at which the present wait began; None while the rank is in no collective."""
    ended: float = field(default_factory=time.monotonic)
    """The time at which the last wait ended."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    """The begin and the end of each wait on a GPU that no `take` has counted."""

    def take(self) -> float:
        """Returns the seconds of the waits since the last call.

        Waits on a GPU that have not passed yet are left to the next call.
        """
        milliseconds = 0.0
        not_passed = []
        for begin, end in self.events:
            # An event that has not passed would have to be waited for, which stalls the host.
            if end.query():
                milliseconds += begin.elapsed_time(end)
            else:
                not_passed.append((begin, end))
        self.events = not_passed

        seconds = self.seconds + milliseconds / 1000
        self.seconds = 0.0
        return seconds

    def place(self, rank: int) -> Place:
        """Returns where this process, which is that rank, stands now."""
        # Read once: another thread may end the wait meanwhile.
        since = self.since
        now = time.monotonic()
        if since is None:
            return Place(rank, node_name(), in_collective=False, number=self.number, seconds=now - self.ended)
        return Place(rank, node_name(), in_collective=True, number=self.number, seconds=now - since)


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a hang.

    Attributes:
        rank: Number of the rank.
        node: Name of its node.
        in_collective: True if it waits for a collective.
        number: Collectives that it has waited for, the present one included.
        seconds: Seconds since the present wait began, or since the last one ended.
    """

    rank: int
    node: str
    in_collective: bool
    number: int
    seconds: float


def first_missing(places: list[Place]) -> str:
    """Returns the rank for which the others wait, in words.

    It is one that is in no collective, or, if all are in one, that with the fewest.
    """
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
"""The waits of this process."""


@contextmanager
def measured_waits() -> Iterator[Waits]:
    """Measures the waits of this process for collectives within the context."""
    original = dist.Work.wait
    vars(WAITS).update(vars(Waits()))  # an earlier phase in this process may have left its waits

    def wait(work: dist.Work, *arguments: Any, **options: Any) -> bool:
        # On a GPU `wait` returns at once, and the stream waits: only events show for how long.
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        events = None
        if on_gpu and not torch.cuda.is_current_stream_capturing():
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        began = time.monotonic()
        WAITS.number += 1
        WAITS.since = began
        try:
            return bool(original(work, *arguments, **options))
        finally:
            ended = time.monotonic()
            WAITS.ended = ended
            if events is not None:
                events[1].record()
                WAITS.events.append(events)
            elif not on_gpu:
                WAITS.seconds += ended - began
            WAITS.since = None

    dist.Work.wait = wait  # type: ignore[method-assign,assignment]
    try:
        yield WAITS
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class RankTime:
    """Mean seconds of one rank's step, over the steps of an interval.

    Attributes:
        rank: Number of the rank.
        node: Name of its node.
        position: Position of its pipeline stage; ranks of one position do the same work.
        wall: Seconds of a step.
        data: Seconds of a step in which it waited for data.
        communication: Seconds of a step in which it waited for collectives.
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


@dataclass(frozen=True)
class Slow:
    """A slow rank.

    Attributes:
        time: Its times.
        times: How many times as long as its peers it is busy.
        reads: True if most of what it takes longer is waiting for data.
    """

    time: RankTime
    times: float
    reads: bool

    def sentence(self, step: int) -> str:
        """Returns a sentence about the rank, which is slow since that step."""
        cause = "waits for data" if self.reads else "computes"
        place = f"rank {self.time.rank} on {self.time.node}"
        return f"{place} {cause} {self.times:.1f} times as long as its peers since step {step}"


def slow_rank(times: list[RankTime]) -> Slow | None:
    """Returns the rank for which the others wait, if any.

    A rank is compared with the usual one of its position, the lower median.
    """
    slowest: Slow | None = None
    for position in {rank_time.position for rank_time in times}:
        peers = [rank_time for rank_time in times if rank_time.position == position]
        longest = max(peers, key=lambda peer: peer.busy)
        # The lower median, so that with two ranks the slow one is not its own measure.
        usual = statistics.median_low(peer.busy for peer in peers)
        excess = longest.busy - usual
        if len(peers) == 1 or longest.busy <= SLOWER * usual or excess <= COST * longest.wall:
            continue

        reads = longest.data - statistics.median_low(peer.data for peer in peers) > excess / 2
        slow = Slow(longest, longest.busy / max(usual, 1e-9), reads)
        if slowest is None or slow.times > slowest.times:
            slowest = slow
    return slowest


class StepTimes:
    """The times of this rank's steps."""

    def __init__(self, waits: Waits, rank: int, position: int, gather: Callable[[RankTime], list[RankTime]]) -> None:
        """Begins without a measured step.

        Args:
            waits: The waits of this process.
            rank: Number of this rank.
            position: Position of its pipeline stage.
            gather: Returns every rank's value, on every rank.
        """
        self.waits, self.rank, self.position, self.gather = waits, rank, position, gather
        self.wall = self.data = self.communication = 0.0
        """Sums over the measured steps since the last exchange."""
        self.steps = -1
        """Measured steps since the last exchange. The first step does not count."""

    @contextmanager
    def step(self, data: Callable[[], float]) -> Iterator[None]:
        """Measures a step. What happens between steps, such as checkpoints of rank 0, does not count.

        Args:
            data: Returns the seconds for which the step waited for data. It is called at the end of the step.
        """
        # Waits before the step, such as those of a checkpoint, are dropped.
        self.waits.take()
        started = time.monotonic()
        yield
        wall, communication = time.monotonic() - started, self.waits.take()
        self.steps += 1
        if self.steps:
            self.wall += wall
            self.communication += communication
            self.data += data()

    def exchange(self) -> list[RankTime] | None:
        """Returns the mean times of all ranks since the last exchange; None if it is not yet due. Collective."""
        if self.steps < INTERVAL:
            return None
        seconds = [total / self.steps for total in (self.wall, self.data, self.communication)]
        self.wall = self.data = self.communication = 0.0
        self.steps = 0
        return self.gather(RankTime(self.rank, node_name(), self.position, *seconds))
