"""Keeps the files up to date that show a running stage: the summaries of its logs and the page of its run.

A thread of the stage's first process writes them at a bounded rate. No error of it reaches the stage.
"""

from __future__ import annotations

import sys
import threading
import time

from pipeline.core import json_files
from pipeline.core.log_summary import Curves, EventSummary
from pipeline.core.store import Store
from pipeline.graph.run import BODY, Run
from pipeline.tracking import page, snapshot

SUMMARY_EVERY = 10.0
PAGE = "status.html"
LAST_SECONDS = 2.0
"""Seconds that the last update may take: the other ranks of a failed launch end within five."""


class LiveFiles:
    """Updates the files of a stage every `SUMMARY_EVERY` seconds, from now on until `close`."""

    def __init__(self, store: Store, run: str, node: str) -> None:
        self.store, self.run, self.folder = store, run, store.logs / run / node
        self.problem = ""
        self._events: EventSummary | None = None
        self._curves: Curves | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="live", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SUMMARY_EVERY)
            try:
                self._update()
                self._write_page(stopping)
            except Exception as error:  # the stage continues after any error of what only shows it
                self._report(error)

    def _update(self) -> None:
        if self._events is None or self._curves is None:
            self._events, self._curves = EventSummary(self.folder), Curves(self.folder)
        for summary in (self._events, self._curves):
            summary.read()
            summary.save()

    def _write_page(self, stopping: bool) -> None:
        """Writes the page of the run, unless a stage of it has just done so. Slurm is not asked at the end: whoever
        ends a failed launch has no time for it."""
        folder = self.store.logs / self.run
        path = folder / PAGE
        try:
            is_fresh = abs(time.time() - path.stat().st_mtime) < page.RELOAD
        except FileNotFoundError:
            is_fresh = False
        if stopping or not is_fresh:
            run = Run(self.run, folder, json_files.read(folder / "run.json", BODY))
            page.write(path, page.page(snapshot.take(run, self.store, ask_slurm=not stopping)))

    def _report(self, error: Exception) -> None:
        """Prints a problem once, as long as it stays the same. The path of an OSError may be that of a draft, which has
        another name each time."""
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
        problem = f"{type(error).__name__}: {reason}".splitlines()[0][:300]
        if problem != self.problem:
            self.problem = problem
            print(f"the live view is not up to date ({problem}); the stage goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Updates the files once more, unless that takes too long."""
        self._stop.set()
        self._thread.join(LAST_SECONDS)
