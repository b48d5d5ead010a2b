"""The process of a stage that starts while the stage's inputs are still made: it loads its modules, then waits.

Importing PyTorch and Megatron takes seconds, which a chain of training phases would pay at each phase.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL = 0.02


@dataclass(frozen=True)
class EarlyStart:
    """gate: a file whose existence admits the process. launcher: the process that creates it."""

    gate: str
    launcher: int

    @classmethod
    def at(cls, gate: Path) -> EarlyStart:
        """Waits at a gate that this process opens."""
        gate.unlink(missing_ok=True)
        return cls(str(gate), os.getpid())

    def admit(self) -> None:
        Path(self.gate).touch()

    def wait(self, modules: Iterable[str]) -> bool:
        """Loads the modules and waits. Returns whether the process is admitted; False if the launcher has ended.

        A module that cannot be loaded is left to the stage, which reports that as its failure.
        """
        with suppress(Exception):
            for module in modules:
                importlib.import_module(module)
        while not os.path.exists(self.gate):
            try:
                os.kill(self.launcher, 0)
            except ProcessLookupError:
                return os.path.exists(self.gate)
            time.sleep(POLL)
        return True
