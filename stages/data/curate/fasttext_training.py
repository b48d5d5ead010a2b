"""Trains a fastText classifier in a process of its own, whose memory is filled with a constant.

With one thread, fastText sets a tenth of its input vectors at random and leaves the others as the allocator gave them:
two trainings in one process differ, or end in "Encountered NaN". glibc fills new memory with a byte if MALLOC_PERTURB_
is set as the process starts, so the other vectors start at -3e-13. Nothing of this project is imported here.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# Complement of the byte 0xAA.
FILL = "85"


def train(examples: Path, model: Path, **settings: Any) -> str | None:
    """Trains on a file of labelled lines in one thread and writes the model; returns the reason if fastText fails."""
    arguments = json.dumps({"input": str(examples), "thread": 1, "verbose": 0, **settings})
    command = [sys.executable, "-P", __file__, str(model), arguments, str(os.getpid())]
    # The variable is read when a process starts, so the training needs one of its own.
    process = subprocess.run(
        command, env={**os.environ, "MALLOC_PERTURB_": FILL}, stderr=subprocess.PIPE, text=True, check=False
    )
    return process.stderr.strip().splitlines()[-1] if process.returncode else None


def main(model: str, arguments: str, parent: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without its parent
    if os.getppid() != int(parent):
        return
    import fasttext  # type: ignore[import-untyped]

    fasttext.train_supervised(**json.loads(arguments)).save_model(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
