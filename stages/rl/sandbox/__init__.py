"""A sandbox for what a model wrote: bubblewrap around a warm process, which gives each program namespaces of its own.

    with Pool(workers=2) as pool:
        (outcome,) = pool.run([Program("print(1 + 1)")])

docs/sandbox.md says what is protected, by what, and what is not. An outcome says how a program ended. It is no verdict:
the program chooses what it prints and what it exits with.
"""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.errors import AtomError
from stages.rl.sandbox.cell import Cell, Program
from stages.rl.sandbox.running import Limits, Outcome, SandboxFailed

__all__ = ["Limits", "Outcome", "Pool", "Program", "SandboxFailed", "missing"]

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Cells that stand warm, one or more for each worker. Close it, or use it as a context."""

    def __init__(self, workers: int | None = None, limits: Limits | None = None, more: Sequence[Limits] = ()) -> None:
        """workers: two for each core, if not given, since a worker often waits for its sandbox. more: the limits of
        further cells of each worker.

        Raises SandboxFailed where no sandbox starts.
        """
        self.workers = workers or 2 * len(os.sched_getaffinity(0))
        self._cells = [[Cell(each) for each in (limits or Limits(), *more)] for _ in range(self.workers)]
        self._free: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self.workers, "sandbox")
        try:
            for row in self._cells:
                for cell in row:
                    cell.start()
                self._free.put(row)
        except AtomError:
            self.close()
            raise

    def each(self, work: Callable[[list[Cell], T], R], items: Iterable[T]) -> list[R]:
        """work(cells, item) for each item, as many at a time as there are workers; results in their order."""

        def one(item: T) -> R:
            row = self._free.get()
            try:
                return work(row, item)
            finally:
                self._free.put(row)

        return list(self._threads.map(one, items))

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """Their outcomes, in order. Raises SandboxFailed where the sandbox failed."""
        return self.each(lambda cells, program: cells[0].run(program), programs)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for row in self._cells:
            for cell in row:
                cell.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def missing() -> str | None:
    """What keeps this machine from running a model's code in safety, in one sentence; none if a sandbox runs here."""
    if shutil.which("bwrap") is None:
        return "code of a model runs under bubblewrap, and there is no bwrap on PATH; apt-get install bubblewrap"
    try:
        with Pool(1) as pool:
            (outcome,) = pool.run([Program("print('held')")])
    except AtomError as e:
        return str(e)
    if outcome.stdout != "held\n":
        return f"a program in the sandbox ends with {outcome.status} here: {outcome.stderr.strip()[-300:]}"
    return None
