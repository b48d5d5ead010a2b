"""NCCL's flight recorder: the last collectives of a rank, for `torch.distributed.flight_recorder.fr_trace`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

PREFIX = "nccl-rank-"
"""Of the files, by rank: `fr_trace FOLDER -p nccl-rank-` names the collective that a rank did not join."""
SETTINGS = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Variables of PyTorch that start the recorder, unless the cluster profile sets others."""


def prepare(folder: Path) -> None:
    """Makes the recorder of this process run, and write to `folder` when a collective times out. Call it before the
    process groups are created."""
    folder.mkdir(exist_ok=True)
    for name, value in {**SETTINGS, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / PREFIX)}.items():
        os.environ.setdefault(name, value)


def write(folder: Path, rank: int) -> Path | None:
    """Writes what the recorder has; returns the folder, or None where PyTorch has no recorder."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_available():
        return None
    (folder / f"{PREFIX}{rank}").write_bytes(dump())
    return folder
