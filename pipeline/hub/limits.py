"""Bounds on what all processes of one `$ATOM_HOME` together read of datasets of the Hub at the same time.

A process that reads holds a slot, one of a fixed number, each of which is a lease in a shared folder, and goes at an
equal share of the bandwidth and of the requests. So the bounds hold over all tasks of all arrays, on any nodes, and the
tasks need not know of each other.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Self

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.lease import Lease
from pipeline.core.store import home_folder
from pipeline.core.text import shown

SLOTS, MEGABYTES, REQUESTS = "ATOM_HUB_SLOTS", "ATOM_HUB_MB_PER_SECOND", "ATOM_HUB_REQUESTS_PER_MINUTE"
# {variable: (default, least, most)}. 400 MB/s are a third of a link of 10 Gb/s. The Hub answers 3,000 requests for
# files in five minutes without a token, and more with one (https://huggingface.co/docs/hub/rate-limits, as of 2026-09).
VARIABLES = {SLOTS: (8, 1, 1000), MEGABYTES: (400, 0, 10**6), REQUESTS: (600, 0, 10**6)}
# Seconds between two looks for a free slot. A task looks at one of them, since many may wait.
POLL = 1.0


@dataclass(frozen=True)
class Limits:
    """The bounds on all processes together.

    Attributes:
        slots: Files that are read at the same time.
        bytes_per_second: Bytes that are read; 0: not bounded.
        requests_per_second: Requests; 0: not bounded.
    """

    slots: int
    bytes_per_second: float
    requests_per_second: float


def limits() -> Limits:
    """Returns the bounds by the variables of the environment. Raises AtomError for a value that is no bound."""
    slots, megabytes, requests = (_number(name) for name in VARIABLES)
    return Limits(slots, 1e6 * megabytes, requests / 60)


def _number(name: str) -> int:
    default, least, most = VARIABLES[name]
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
        raise AtomError(f"{name} = {shown(text)} is no whole number from {least} to {most}; correct it, or unset it")
    return int(text)


class _Pace:
    """Lets units pass at a rate; time in which none come is not saved up."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0

    def take(self, units: float) -> None:
        """Waits until the units before these have passed."""
        if self.rate:
            self.wait()
            self.free = time.monotonic() + units / self.rate

    def wait(self) -> None:
        time.sleep(max(0.0, self.free - time.monotonic()))


class Slot:
    """A slot, which is taken with the first request and kept until the context ends. One thread uses it."""

    def __init__(self, stopped: threading.Event | None = None) -> None:
        """Takes nothing yet.

        Args:
            stopped: Ends the wait for a slot once it is set; None: nothing does.

        Raises:
            AtomError: A variable of the environment is no bound.
        """
        self.limits, self._stopped = limits(), stopped or threading.Event()
        self._requests = _Pace(self.limits.requests_per_second / self.limits.slots)
        self._bytes = _Pace(self.limits.bytes_per_second / self.limits.slots)
        self._lease: Lease | None = None
        self.waited = 0.0  # seconds, for the rates

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.release(wait=kind is None)

    def release(self, wait: bool = True) -> None:
        """Gives the slot back if it is held, once what was read has passed at the rates; a request takes one again."""
        if self._lease is None:
            return
        try:
            if wait:
                self._requests.wait()
                self._bytes.wait()
        finally:
            self._lease.release()
            self._lease = None

    def take(self) -> None:
        """Waits for a slot, unless this one is held already.

        Raises:
            MachineError: The wait was stopped, or the folder of the slots cannot be written.
        """
        if self._lease is not None:
            return
        first, slots = random.randrange(self.limits.slots), self.limits.slots
        for number in itertools.count():
            folder = home_folder() / "hub-slots" / str((first + number) % slots)
            try:
                self._lease = Lease.take(folder)
            except OSError as error:
                raise MachineError(f"{folder} cannot be written ({error.strerror}); check ATOM_HOME") from None
            if self._lease is not None:
                _forget_old_leases(self._lease)
                return
            # All are tried once, then one at a time.
            if number >= slots - 1 and self._stopped.wait(POLL):
                raise MachineError("stopped before a slot to read from the Hub was free; run the same command again")

    def request(self, count: int = 1) -> None:
        """Waits until requests may be made."""
        self.take()
        self._wait(self._requests, count)

    def received(self, size: int) -> None:
        """Waits until the bytes before these have passed at the rate."""
        self._wait(self._bytes, size)

    def _wait(self, pace: _Pace, units: float) -> None:
        start = time.monotonic()
        pace.take(units)
        self.waited += time.monotonic() - start


def _forget_old_leases(lease: Lease) -> None:
    """Removes the files of a slot's earlier holders, which would only grow in number.

    The last hundred stay, since a process that is slow may still look at them.
    """
    for number in range(lease.number - 100, 0, -1):
        try:
            (lease.folder / f"lease.{number}").unlink()
        except OSError:
            return
