"""NCCL's flight recorder: the last collectives of a rank, for `torch.distributed.flight_recorder.fr_trace`."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path

import torch

PREFIX = "nccl-rank-"
"""Of the files, by rank: `fr_trace FOLDER -p nccl-rank-` names the collective that a rank did not join."""
SETTINGS = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Variables of PyTorch that start the recorder, unless the cluster profile sets others."""
SECONDS = 60.0
"""The time that the recorder may take to give what it has."""


def prepare(folder: Path) -> None:
    """Makes the recorder of this process run, and write to `folder` when a collective times out. Call it before the
    process groups are created."""
    folder.mkdir(exist_ok=True)
    for name, value in {**SETTINGS, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / PREFIX)}.items():
        os.environ.setdefault(name, value)


def write(folder: Path, rank: int) -> Path | None:
    """Writes what the recorder has; returns the folder, or None where PyTorch has no recorder. A recorder that takes
    longer than SECONDS ends this process with exit code 1."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_available():
        return None
    _write_in_time(dump, folder / f"{PREFIX}{rank}")
    return folder


def _write_in_time(dump: Callable[[], bytes], path: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # the recorder holds the interpreter, so no thread could
    try:
        path.write_bytes(dump())
    finally:
        faulthandler.cancel_dump_traceback_later()
