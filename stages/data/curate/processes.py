"""Work on many parts by several processes of one machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from pipeline.core.errors import MachineError

ForEach = Callable[[Callable[[int], None], int], Iterator[int]]
"""for_each(work_on, count) calls the picklable work_on with each number below count, and yields how many are done. An
error of a call ends the others, and is raised."""


@contextmanager
def processes(number: int) -> Iterator[ForEach]:
    """A context with a `ForEach` of at most `number` processes, and of one for each core that this one may use. With
    one, no other process is started."""
    number = min(number, len(os.sched_getaffinity(0)))
    if number < 2:
        yield _in_turn
        return
    earlier = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a copy of a process with threads may hang
    with ProcessPoolExecutor(number, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:

        def at_once(work_on: Callable[[int], None], count: int) -> Iterator[int]:
            for done, future in enumerate(as_completed([pool.submit(work_on, n) for n in range(count)]), start=1):
                future.result()
                yield done

        try:
            yield at_once
        except BrokenProcessPool:
            raise MachineError(
                "a process of this stage was killed, perhaps for its memory; run again: finished parts are kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - earlier:
                child.terminate()
            raise


def _in_turn(work_on: Callable[[int], None], count: int) -> Iterator[int]:
    for n in range(count):
        work_on(n)
        yield n + 1


def _end_with(parent: int) -> None:
    """Lets this process leave Ctrl-C to its parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
