"""A sandbox for model-written code: bubblewrap around a warm process, which gives each program its own namespaces.

    with Pool(workers=2) as pool:
        (outcome,) = pool.run([Program("print(1 + 1)")])

docs/sandbox.md describes the protections and their limits. An outcome describes the end of a program. It is not a
verdict: the program controls its output and its exit code.

If a sandbox dies or does not start, its item of work is tried again, up to ATTEMPTS times, without parallel work. If
its sandbox dies each time, a harmless probe runs in its place, with most of the allowed memory. If the probe survives,
the item was the cause; if not, the machine was: SandboxFailed.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.core.errors import AtomError
from stages.rl.sandbox.cell import Cell, Program
from stages.rl.sandbox.limits import DEATHS, Limits, Outcome, SandboxFailed

__all__ = ["Limits", "Outcome", "Pool", "Program", "SandboxFailed", "missing"]

# Times that an item is tried whose sandbox dies.
ATTEMPTS = 3
# The outcome of a program that killed its sandbox, or was killed with it.
KILLED = Outcome("killed", "", "", -9, 0.0)

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """A pool of warm cells, one or more for each worker. Close it, or use it as a context."""

    def __init__(
        self, workers: int | None = None, limits: Limits | None = None, extra_limits: Sequence[Limits] = ()
    ) -> None:
        """Starts the cells.

        Args:
            workers: Number of workers; by default two for each core, because a worker often waits for its sandbox.
            limits: Limits of the first cell of each worker.
            extra_limits: Limits of its further cells.

        Raises:
            SandboxFailed: No sandbox starts.
        """
        self.workers = workers or 2 * len(os.sched_getaffinity(0))
        self._cells = [
            [Cell(cell_limits) for cell_limits in (limits or Limits(), *extra_limits)] for _ in range(self.workers)
        ]
        self._free: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
        # Two items that each wait for all cells would block each other.
        self._exclusive = threading.Lock()
        self._threads = ThreadPoolExecutor(self.workers, "sandbox")
        try:
            for cells in self._cells:
                for cell in cells:
                    cell.start()
                self._free.put(cells)
        except AtomError:
            self.close()
            raise

    def map(self, work: Callable[[list[Cell], T], R], items: Iterable[T], killed: Callable[[T], R]) -> list[R]:
        """Returns work(cells, item) for each item, in order; as many run at a time as there are workers.

        `killed(item)` is the result for an item that kills its sandbox.

        Raises:
            SandboxFailed: The sandbox itself fails.
        """

        def run_item(item: T) -> R:
            cells = self._free.get()
            try:
                return work(cells, item)
            except (*DEATHS, SandboxFailed):
                # A closed cell starts anew at its next job.
                _close(cells)
            finally:
                self._free.put(cells)
            return self._retry_alone(work, item, killed)

        return list(self._threads.map(run_item, items))

    def _retry_alone(self, work: Callable[[list[Cell], T], R], item: T, killed: Callable[[T], R]) -> R:
        with self._exclusive:
            # All workers wait meanwhile: a parallel program may have taken the memory.
            all_cells = [self._free.get() for _ in range(self.workers)]
            try:
                for _ in range(1, ATTEMPTS):
                    try:
                        return work(all_cells[0], item)
                    except DEATHS:
                        _close(all_cells[0])
                for cell in all_cells[0]:
                    probe(cell)
                return killed(item)
            finally:
                for cells in all_cells:
                    self._free.put(cells)

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """Returns the outcomes of programs, in order.

        Raises:
            SandboxFailed: The sandbox failed.
        """
        return self.map(lambda cells, program: cells[0].run(program), programs, lambda _: KILLED)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for cells in self._cells:
            _close(cells)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(cells: list[Cell]) -> None:
    for cell in cells:
        cell.close()


def probe(cell: Cell) -> None:
    """Raises SandboxFailed if a harmless program that uses its limits does not end normally in the cell."""
    size = cell.limits.memory_bytes * 3 // 4
    try:
        outcome = cell.run(Program(f"print(len(b'x' * {size}))"))
    except DEATHS:
        outcome = KILLED
    if outcome.stdout != f"{size}\n":
        raise SandboxFailed(
            f"the sandbox fails {ATTEMPTS} times, and then for a program that does no harm ({outcome.status}); "
            "see the kernel's log, and whether memory is short"
        )


def missing() -> str | None:
    """Returns the reason why this machine cannot run a model's code safely; None if a sandbox runs here."""
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
