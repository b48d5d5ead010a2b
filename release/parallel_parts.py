"""One function over the parts of a table, by several processes if there is much to read."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

MOST_ALONE = 64 << 20
"""Bytes of parts that one process reads: a second one takes about as long to start."""
Part = TypeVar("Part")
Result = TypeVar("Result")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_parts(work: Callable[[Part], Result], parts: Sequence[Part], files: Sequence[Path]) -> Iterator[Result]:
    """The result of `work` for each part, in their order. Each process holds what one part needs, so memory grows with
    the cores and not with the parts. work: picklable, as parts and results are. files: that are read, for their size.
    An error of a call is raised."""
    number = min(cores(), len(parts))
    if number < 2 or sum(path.stat().st_size for path in files if path.exists()) <= MOST_ALONE:
        yield from map(work, parts)
        return
    # A fork would copy the threads' locks of Arrow in an unknown state.
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
