"""Release checkpoints: safetensors and JSON without machine-specific content, so equal training gives equal bytes.

A folder `step-<n>` holds `model.safetensors` (fp32, full tensors by global name), `optimizer.safetensors`
(`exp_avg.<name>`, `exp_avg_sq.<name>`; absent at step 0, where Adam's moments are zero) and `state.json`. What is
larger than SHARD_BYTES is split as on the Hub: `model-00001-of-00009.safetensors`, …, `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.core import atomic_files
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
        write_shards(partial, stem, ((key, read(*entry, shapes[entry[1]])) for key, entry in entries.items()))
    (partial / STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes `<stem>.safetensors`, or, above SHARD_BYTES, shards in the order of the tensors with an index; nothing if
    there are no tensors. Holds the tensors of one file at a time.

    Raises MachineError if a write fails.
    """
    sizes: dict[str, int] = {}

    def measured() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            sizes[name] = tensor.nbytes
            yield name, tensor

    files = write_files(folder, stem, measured(), SHARD_BYTES)
    if len(set(files.values())) > 1:
        write_index(folder, stem, files, {"total_size": sum(sizes.values())})


def write_files(
    folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> dict[str, str]:
    """Writes tensors in their order to `<stem>.safetensors`, or to shards of at most so many bytes (or one tensor).
    Returns the file of each tensor. Holds the tensors of one file at a time.

    Raises MachineError if a write fails.
    """
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        shards.append(list(held))
        save_tensors(folder / f"{stem}-{len(shards):05d}.partial", held)
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > most_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
    if held:
        flush()
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        os.rename(folder / f"{stem}-{number:05d}.partial", folder / f"{stem}{suffix}.safetensors")
        files |= dict.fromkeys(names, f"{stem}{suffix}.safetensors")
    return files


def write_index(
    folder: Path, stem: str, files: Mapping[str, str], metadata: Mapping[str, Any], **entries: Mapping[str, Any]
) -> None:
    """Writes the index of shards, atomically. files: {tensor: its file}; entries: further ones."""
    index = {"metadata": dict(metadata), "weight_map": dict(files), **entries}
    atomic_files.write(folder / _index(stem), json.dumps(index, indent=1, sort_keys=True) + "\n")


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint's model or optimizer, or of an exported model, each read on access.

    A file is open only while it is read: pages that a reader has seen would otherwise count as its memory.
    Raises AtomError if a file is missing or damaged, or if an index does not add up with its files.
    """

    def __init__(self, folder: Path, stem: str = MODEL) -> None:
        self.files: dict[str, Path] = {}  # tensor -> the file that holds it
        self._shapes: dict[str, Shape] = {}
        try:
            index, names = folder / _index(stem), [f"{stem}.safetensors"]
            stated: dict[str, str] | None = None
            if index.exists():
                stated = json.loads(index.read_text())["weight_map"]
                names = sorted(set(stated.values()))
            for name in names:
                self._read_header(folder / name)
            for key, path in self.files.items():
                if stated is not None and stated.get(key) != path.name:
                    raise ValueError(f"{index.name} does not list {key} of {path.name}")
            if absent := sorted((stated or {}).keys() - self.files.keys()):
                raise ValueError(f"{index.name} lists {absent[0]}, which {(stated or {})[absent[0]]} does not hold")
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(folder, error) from None

    def _read_header(self, path: Path) -> None:
        try:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self.files[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.files[name]
        try:
            with _open(path) as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes)


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


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


def _unreadable(path: Path, error: Exception) -> AtomError:
    return AtomError(f"checkpoint {path} cannot be read ({error}); remove its artifact and run again")


def load_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state
