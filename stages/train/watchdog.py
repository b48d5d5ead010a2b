"""A watchdog for hanging ranks: logs the stacks of all ranks and ends the attempt.

A rank that finishes no step for `timeout` seconds, while no rank reads or writes checkpoints, writes into the work
folder the stacks of its threads and the collective that it is in; since all
ranks wait for the one that hangs, all of them do so. Rank 0 prints the stacks to its log, names the ranks without
stacks (stopped, or on a dead node) or else the one that did not arrive, and ends the attempt; the next one continues
from the last work checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from pipeline.core import atomic_files
from pipeline.core.lease import SharedProgress
from pipeline.core.stage import Report
from stages.train import parallel
from stages.train.step_times import WAITS, Place, first_missing

COLLECT_SECONDS = 10.0
"""Seconds for which rank 0 waits for the stacks of all ranks, which detect a hang at about the same time."""
START_SECONDS = 600.0
"""Minimum time for rendezvous and building the model."""
PROGRESS_SECONDS = 10.0
"""The longest time from one sign of progress to the next of a rank that reads or writes checkpoints."""


class Watchdog:
    """Watches from the beginning to the end of the `with` block, including the rendezvous.

    `alive()` reports a finished step, and `progress()` bytes of a checkpoint for which this rank's training waits.
    Progress of one rank counts for all, because the others wait for it.
    """

    def __init__(self, phase: str, timeout: float, work: Path, report: Report) -> None:
        """Makes a watchdog, which begins to watch with the `with` block.

        Args:
            phase: Name of the phase, for messages.
            timeout: Seconds without a finished step after which the attempt ends.
            work: Work folder, which all ranks see.
            report: Ends the attempt.
        """
        self.phase, self.timeout, self.work, self.report = phase, timeout, work, report
        self.rank, self.world = parallel.rank_and_world()
        # The time of the last sign of progress, and the seconds until the next one may come.
        self.last_sign, self.limit = time.monotonic(), max(timeout, START_SECONDS)
        self.shared = SharedProgress(work / "progress", min(PROGRESS_SECONDS, timeout / 10))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()

    def alive(self) -> None:
        """Reports that this rank has finished a step."""
        self.last_sign, self.limit = time.monotonic(), self.timeout

    def progress(self, size: int = 0) -> None:
        """Reports that this rank has read, hashed or written so many bytes."""
        self.last_sign = time.monotonic()
        self.shared.report(size)

    def _watch(self) -> None:
        while not self.stop.wait(min(1.0, self.timeout / 10)):
            # Progress of any rank counts, through the shared file system: the others wait for it in a collective.
            if self.shared.has_moved():
                self.last_sign = time.monotonic()
            if time.monotonic() - self.last_sign > self.limit:
                self._abandon()

    def _abandon(self) -> None:
        message = f"{self.phase}: no step was finished for {self.limit:g} s"
        try:
            message += self._stacks()
        except Exception as error:  # a full disk must not keep a hang alive
            message += f"; the stacks could not be written ({error})"
        self.report.abandon(f"{message}; run again to go on from the last work checkpoint")

    def _stacks(self) -> str:
        """Writes and prints this rank's stacks; rank 0 prints those of the others too.

        Returns the end of the message.
        """
        folder = self.work / "stacks"
        folder.mkdir(exist_ok=True)
        path = folder / f"rank-{self.rank:05d}.txt"
        with open(path, "w") as file:
            # All threads: the main one stands in the collective, and another may be writing a checkpoint.
            faulthandler.dump_traceback(file, all_threads=True)
        # After the stacks: for rank 0 this file is the sign that they are complete.
        atomic_files.write(path.with_suffix(".json"), json.dumps(asdict(WAITS.place(self.rank))))
        print(
            f"rank {self.rank}: no step for {self.limit:g} s, it stands here:\n{path.read_text()}",
            file=sys.stderr,
            flush=True,
        )
        if self.rank == 0:
            return self._collect(folder)
        time.sleep(2 * COLLECT_SECONDS)  # rank 0 reports first
        return "; the stacks of all ranks are in the log"

    def _collect(self, folder: Path) -> str:
        """Prints the stacks of the other ranks. Returns the end of rank 0's message."""
        # Ranks find the hang within seconds of each other, as all wait in the same step.
        hang_time, expected = time.time(), set(range(self.world))
        deadline = time.monotonic() + COLLECT_SECONDS
        while (missing := expected - self._ranks_with_stacks(hang_time)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for rank in sorted(expected - missing - {0}):
            stacks = (folder / f"rank-{rank:05d}.txt").read_text()
            print(f"rank {rank} stands here:\n{stacks}", file=sys.stderr, flush=True)

        message = "; the stacks of all ranks are in the log"
        if missing:
            silent_ranks = ", ".join(map(str, sorted(missing)))
            message = f"; no sign of rank {silent_ranks}; the stacks of the others are in the log"
        elif self.world > 1:
            places = [json.loads((folder / f"rank-{rank:05d}.json").read_text()) for rank in sorted(expected)]
            message += f"; {first_missing([Place(**place) for place in places])}"
        return message

    def _ranks_with_stacks(self, hang_time: float) -> set[int]:
        """Returns the ranks whose stacks were written in this hang, which rank 0 found at `hang_time`."""
        ranks = set()
        for path in (self.work / "stacks").glob("rank-*.json"):  # written after the stacks
            # The limit is a margin for the clocks of other nodes. Stacks of an earlier hang are older.
            if path.stat().st_mtime > hang_time - self.limit:
                ranks.add(int(path.stem.removeprefix("rank-")))
        return ranks
