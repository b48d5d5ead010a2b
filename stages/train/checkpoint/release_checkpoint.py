"""Release checkpoints: safetensors and JSON without machine-specific content, so equal training gives equal bytes.

A folder `step-<n>` holds `model.safetensors` (fp32, full tensors by global name), `optimizer.safetensors`
(`exp_avg.<name>`, `exp_avg_sq.<name>`; absent at step 0, where Adam's moments are zero) and `state.json`. What is
larger than SHARD_BYTES is split as on the Hub: `model-00001-of-00009.safetensors`, …, `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.core.errors import AtomError, MachineError
from stages.mcore.param_names import BUFFERS
from stages.train.checkpoint import SHARD_BYTES

MODEL, OPTIMIZER, STATE = "model", "optimizer", "state.json"

Shape = tuple[int, ...]
Read = Callable[[str, str, Shape], torch.Tensor]
"""(kind, global name, full shape) -> the full fp32 tensor; kinds are `weight`, `exp_avg` and `exp_avg_sq`."""


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(folder: Path) -> list[int]:
    """The steps of the sealed checkpoints in a folder, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def write(
    folder: Path, shapes: Mapping[str, Shape], moments: Iterable[str], read: Read, state: Mapping[str, Any]
) -> None:
    """Writes `folder` atomically, replacing an earlier one. Holds the tensors of one file at a time.

    moments: the kinds of tensors that the optimizer has.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stem, kinds in ((MODEL, ("weight",)), (OPTIMIZER, tuple(moments))):
        entries = {
            (name if kind == "weight" else f"{kind}.{name}"): (kind, name)
            for kind in kinds
            for name in shapes
            if kind == "weight" or not name.endswith(BUFFERS)
        }
        shards = _shards({key: 4 * math.prod(shapes[name]) for key, (_, name) in entries.items()})
        files: dict[str, str] = {}
        for number, keys in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            tensors = {key: read(*entries[key], shapes[entries[key][1]]) for key in keys}
            save_tensors(partial / f"{stem}{suffix}.safetensors", tensors)
            files |= dict.fromkeys(keys, f"{stem}{suffix}.safetensors")
        if len(shards) > 1:
            size = sum(4 * math.prod(shapes[name]) for _, name in entries.values())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (partial / _index(stem)).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    (partial / STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Tensors by file: in their order, each file as full as it may be."""
    shards: list[list[str]] = []
    remaining = 0
    for key, size in sizes.items():
        if not shards or size > remaining:
            shards.append([])
            remaining = SHARD_BYTES
        shards[-1].append(key)
        remaining -= size
    return shards


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint's model or optimizer, each read on access.

    Raises AtomError if a file is missing or damaged.
    """

    def __init__(self, folder: Path, stem: str = MODEL) -> None:
        self.files: dict[str, Any] = {}  # tensor -> the open file that holds it
        try:
            index = folder / _index(stem)
            names = {f"{stem}.safetensors"}
            if index.exists():
                names = set(json.loads(index.read_text())["weight_map"].values())
            for name in sorted(names):
                file = safe_open(folder / name, framework="pt")
                self.files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise _unreadable(folder, error) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes one safetensors file whose bytes depend only on the tensors (a second metadata entry has no fixed order).

    Raises AtomError if the write fails.
    """
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        path.touch()
        mode = path.stat().st_mode  # by umask; the library makes files that only their owner may read
        save_file(contiguous, path, metadata={"format": "pt"})
        path.chmod(stat.S_IMODE(mode))
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{path} cannot be written ({error}); make room and run again to go on") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file. Raises AtomError if it is missing or damaged."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> AtomError:
    return AtomError(f"checkpoint {path} cannot be read ({error}); remove its artifact and run again")


def load_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state
