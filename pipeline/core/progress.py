"""Figures and progress as text: of a run in lines, of a command in one line that is drawn again."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

# Seconds between two lines on the progress of a stage.
LINE_EVERY = 10.0


def human(value: float) -> str:
    """Returns a figure with three significant digits and a unit prefix: 21300 → 21.3k."""
    for suffix, power in zip("ZEPTGMk", (21, 18, 15, 12, 9, 6, 3), strict=True):
        # Four digits need no prefix.
        if abs(value) >= max(1e4, 10.0**power):
            return f"{value / 10.0**power:.3g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns a time in seconds as text: 60 as 1:00, 3700 as 1:01:40."""
    hours, remainder = divmod(round(seconds), 3600)
    return f"{hours}:{remainder // 60:02d}:{remainder % 60:02d}" if hours else f"{remainder // 60}:{remainder % 60:02d}"


def stages(number: int) -> str:
    return f"{number} stage{'' if number == 1 else 's'}"


def figures_text(figures: Mapping[str, float]) -> str:
    names = {"tokens_per_s": "tokens/s"}
    return "  ".join(f"{names.get(name, name)} {human(value)}" for name, value in figures.items())


class StatusLine:
    """The progress of a command on stderr, since its stdout is for the result.

    On a terminal one line is drawn again and again. Elsewhere each step has a line. With `quiet` nothing is printed. No
    thread is started, since checks fork.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._begin = time.monotonic()

    def __call__(self, text: str) -> None:
        if self.quiet:
            return
        if not self.live:
            print(text, file=sys.stderr, flush=True)
            return
        width = shutil.get_terminal_size().columns
        # One column stays free, because some terminals wrap a full line.
        line = f"{duration(time.monotonic() - self._begin):>5}  {text}"
        print(f"\r\x1b[2K{line[: width - 1]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live and not self.quiet:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


class Display:
    """The progress of stages, as the launcher reports it: a line for each stage every ten seconds, and at its ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.finished = self.total = 0
        self._seconds: dict[str, float] = {}
        self._last_printed: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}

    def begin(self, total: int, finished: int) -> None:
        self.total, self.finished = total, finished
        self._line(f"{stages(total)}, {finished} sealed already")

    def _line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def started(self, name: str, log: str, ranks: int = 1) -> None:
        self._first.pop(name, None)
        self._line(f"{name}: started{'' if ranks == 1 else f' on {ranks} ranks'}, log {log}")

    def progress(
        self, name: str, at: float, done: float, total: float, unit: str, figures: Mapping[str, float]
    ) -> None:
        """Shows the progress of a stage. `at` is the time of the report, in seconds since the epoch."""
        current_time = time.monotonic()
        first_time, first_done = self._first.setdefault(name, (at, done))
        if current_time - self._last_printed.get(name, -LINE_EVERY) < LINE_EVERY:
            return
        self._last_printed[name] = current_time
        rate = (done - first_done) / (at - first_time) if at > first_time else 0
        eta = f"  eta {duration((total - done) / rate)}" if rate > 0 else ""
        self._line(f"{name}: {done}/{total} {unit}  {figures_text(figures)}{eta}")

    def note(self, name: str, text: str) -> None:
        self._line(f"{name}: {text}")

    def usage(self, name: str, wall_seconds: float) -> None:
        self._seconds[name] = wall_seconds

    def elsewhere(self, name: str, worker: str) -> None:
        # Said once for a stage. The @ keeps this apart from the times of its progress.
        if self._last_printed.get(name + "@") is None:
            self._last_printed[name + "@"] = time.monotonic()
            self._line(f"{name}: {worker} is running it; waiting for its result")

    def sealed(self, name: str, elsewhere: bool = False) -> None:
        self.finished += 1
        duration_text = f" in {duration(self._seconds[name])}" if name in self._seconds else ""
        origin = " by another run" if elsewhere else ""
        self._line(f"{name}: sealed{origin}{duration_text}  [{self.finished}/{self.total}]")

    def failed(self, name: str, text: str) -> None:
        self._line(f"{name}: FAILED: {text}")

    def stopping(self) -> None:
        self._line("stopping: waiting for the running stages to leave clean work folders")
