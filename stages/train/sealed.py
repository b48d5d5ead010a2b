"""Sealed checkpoints: safetensors and JSON with nothing of the machine in them, so that equal training is equal bytes.

A folder `step-<n>` holds `model.safetensors` (fp32, full tensors by global name), `optimizer.safetensors`
(`exp_avg.<name>`, `exp_avg_sq.<name>`; absent at step 0, where Adam's moments are zero) and `state.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import AtomError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(folder: Path) -> list[int]:
    """The steps of the sealed checkpoints in a folder, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def write(
    folder: Path,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    """Writes `folder`, complete or not at all, replacing an earlier one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / MODEL, model)
    if optimizer:
        save_tensors(partial / OPTIMIZER, optimizer)
    (partial / STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file whose bytes follow from the tensors alone (a second metadata entry would not be ordered).

    Raises AtomError if the file system does not take it.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise AtomError(f"{path} cannot be written ({error}); make room and run again to go on") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises AtomError if the file is missing or damaged."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise AtomError(f"checkpoint {path} cannot be read ({error}); remove its artifact and run again") from None


def load_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state
