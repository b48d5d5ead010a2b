"""Progress that several processes share, on any shared file system: a process that waits sees that another one works.

A process that reads, hashes or writes touches one file, at most once in an interval. A process that waits for it
compares the time of that file with the time that it saw before. No clocks of hosts are compared.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


class SharedProgress:
    """One process's view of the shared file. Any thread may use it.

    Args:
        path: The shared file. Its folder must exist once there is progress.
        interval: Seconds between two touches by this process.
    """

    def __init__(self, path: Path, interval: float) -> None:
        self.path, self.interval = path, interval
        self._next_touch = 0.0
        self._seen = self._time()

    def report(self, size: int = 0) -> None:
        """Shows the others that this process made progress. Cheap: call it after each piece of work.

        Args:
            size: Bytes that were read, hashed or written, for callers that count them. It is not used.
        """
        now = time.monotonic()
        if now < self._next_touch:
            return
        self._next_touch = now + self.interval
        with suppress(OSError):  # on a full disk the work itself fails with a sentence
            self.path.touch()

    def has_moved(self) -> bool:
        """Returns True if any process, this one included, has touched the file since the last call."""
        current = self._time()
        moved, self._seen = current != self._seen, current
        return moved

    def _time(self) -> int:
        """The file's time of modification in nanoseconds; 0 without a file."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0
