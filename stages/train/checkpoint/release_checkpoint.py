"""Release checkpoints: safetensors and JSON without machine-specific content, so equal training gives equal bytes.

A folder `step-<n>` holds `model.safetensors` (fp32, full tensors by global name), `optimizer.safetensors`
(`<state>.<name>`; absent at step 0, where the optimizer has no states yet) and `state.json`. What is larger than
SHARD_BYTES is split as on the Hub: `model-00001-of-00009.safetensors`, …, `model.safetensors.index.json`.

The files follow from the model alone (`plan`). So any number of processes can write them, each some of the files, into
a folder of parts (`write_part`), from which `join` links them. A part that is there is not written again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, FileRecord, Progress, hand_over_hash, no_progress, sha256_file
from stages.mcore.optimizer import StateTensor
from stages.train.checkpoint import SHARD_BYTES, tensor_file

MODEL, OPTIMIZER, STATE = "model", "optimizer", "state.json"

T = TypeVar("T")
Shape = tuple[int, ...]
Read = Callable[[str, str, Shape], Tensor]
"""(`weight` or a state, global name, full shape) -> the full fp32 tensor."""


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(folder: Path) -> list[int]:
    """The steps of the sealed checkpoints in a folder, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file of a release checkpoint.

    Attributes:
        name: Its name.
        stem: `model` or `optimizer`: the files of one stem have one index.
        tensors: (kind, global name, full shape) of each tensor, by its name in the file.
    """

    name: str
    stem: str
    tensors: dict[str, tuple[str, str, Shape]]

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, Shape]]:
        return {key: (torch.float32, shape) for key, (_, _, shape) in self.tensors.items()}


def plan(shapes: Mapping[str, Shape], states: Mapping[str, StateTensor]) -> list[TensorFile]:
    """Returns the tensor files of a checkpoint, in order.

    Args:
        shapes: Shape of each tensor of the model.
        states: The states of the optimizer (`OptimizerSettings.state_shapes`); empty before the first step.
    """
    files = []
    weights = {name: ("weight", name, shape) for name, shape in shapes.items()}
    for stem, tensors in ((MODEL, weights), (OPTIMIZER, states)):
        shards = list(
            _split(tensors.items(), lambda tensor: torch.float32.itemsize * math.prod(tensor[2]), SHARD_BYTES)
        )
        files += [TensorFile(_file_name(stem, n, len(shards)), stem, shard) for n, shard in enumerate(shards, start=1)]
    return files


def write(
    folder: Path, shapes: Mapping[str, Shape], states: Mapping[str, StateTensor], read: Read, state: Mapping[str, Any]
) -> None:
    """Writes `folder` atomically, replacing an earlier one. Holds one tensor at a time. Arguments as for `plan`."""
    parts = folder.with_name(folder.name + ".parts")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    files = plan(shapes, states)
    for file in files:
        write_part(parts, file, read)
    records = read_records(parts, files)
    assert records is not None
    join(folder, parts, files, records, state)
    shutil.rmtree(parts)


def write_part(parts: Path, file: TensorFile, read: Read, progress: Progress = no_progress) -> None:
    """Writes and flushes one file into a folder of parts, and then its record, `<name>.json`.

    A file that an earlier call has written is kept: it is hashed again only if it was touched since.

    Raises MachineError if a write fails.
    """
    path = parts / file.name
    record_path = _record_path(path)
    try:
        # The record holds size, time and inode, so an untouched file is not hashed again.
        if FileRecord(*json.loads(record_path.read_text())).describes(path, progress):
            return
    except (FileNotFoundError, ValueError, TypeError):  # it was not written, or not to its end
        pass
    _, sha256 = tensor_file.write(path, file.shapes, lambda key: read(*file.tensors[key]), progress, durable=True)
    atomic_files.write(record_path, json.dumps(FileRecord.of(path, sha256)), durable=True)


def read_records(parts: Path, files: Iterable[TensorFile]) -> dict[str, FileRecord] | None:
    """The records of all files by name; None until all are written."""
    # One listing in place of a look for each file: rank 0 asks again and again until all are there.
    present = set(os.listdir(parts))
    names = [file.name for file in files]
    if not all(_record_path(parts / name).name in present for name in names):
        return None
    return {name: FileRecord(*json.loads(_record_path(parts / name).read_text())) for name in names}


def join(
    folder: Path, parts: Path, files: Iterable[TensorFile], records: Mapping[str, FileRecord], state: Mapping[str, Any]
) -> dict[str, FileRecord]:
    """Makes `folder` of links to the parts, indices and state.json, atomically, replacing an earlier one.

    Hands the hashes over to `write_manifest`. Returns the records of all files of the folder.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    by_stem: dict[str, list[TensorFile]] = {}
    for file in files:
        # Links: a checkpoint on the disk twice would need room that the plan does not count.
        os.link(parts / file.name, partial / file.name)
        by_stem.setdefault(file.stem, []).append(file)
    for stem, shards in by_stem.items():
        if len(shards) > 1:
            total = sum(_fp32_bytes(tensor) for shard in shards for tensor in shard.tensors.values())
            write_index(partial, stem, {key: s.name for s in shards for key in s.tensors}, {"total_size": total})
    (partial / STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    # A reader sees the earlier folder or the whole new one.
    os.rename(partial, folder)
    joined: dict[str, FileRecord] = {}
    for path in folder.iterdir():
        sha256 = records[path.name].sha256 if path.name in records else sha256_file(path)
        # The seal of the artifact then need not read the files again.
        hand_over_hash(path, sha256)
        joined[path.name] = FileRecord.of(path, sha256)
    return joined


def _fp32_bytes(tensor: StateTensor) -> int:
    return 4 * math.prod(tensor[2])


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _file_name(stem: str, number: int, count: int) -> str:
    """The name of a shard, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def _split(tensors: Iterable[tuple[str, T]], size: Callable[[T], int], most_bytes: int) -> Iterator[dict[str, T]]:
    """Divides tensors in their order into shards of at most so many bytes, or of one tensor."""
    shard: dict[str, T] = {}
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + size(tensor) > most_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = tensor
        shard_bytes += size(tensor)
    if shard:
        yield shard


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes `<stem>.safetensors`, or, above SHARD_BYTES, shards in the order of the tensors with an index.

    Writes nothing if there are no tensors. Holds the tensors of one file at a time. Raises MachineError if a write
    fails.
    """
    sizes: dict[str, int] = {}

    def measured() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            sizes[name] = tensor.nbytes
            yield name, tensor

    files = write_files(folder, stem, measured(), SHARD_BYTES)
    if len(set(files.values())) > 1:
        write_index(folder, stem, files, {"total_size": sum(sizes.values())})


def write_files(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> dict[str, str]:
    """Writes tensors in their order to `<stem>.safetensors`, or to shards of at most so many bytes (or one tensor).

    Returns the file of each tensor. Holds the tensors of one file at a time, and hands its hash over to
    `write_manifest`.

    Raises MachineError if a write fails.
    """
    shards: list[list[str]] = []
    for shard in _split(tensors, lambda tensor: tensor.nbytes, most_bytes):
        shards.append(list(shard))
        path = folder / f"{stem}-{len(shards):05d}.partial"
        hand_over_hash(path, save_tensors(path, shard))
        del shard  # before the next tensors are read
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = _file_name(stem, number, len(shards))
        # The number of shards, which is in their names, is known only now.
        os.rename(folder / f"{stem}-{number:05d}.partial", folder / name)
        files |= dict.fromkeys(names, name)
    return files


def write_index(
    folder: Path, stem: str, files: Mapping[str, str], metadata: Mapping[str, Any], **entries: Mapping[str, Any]
) -> None:
    """Writes the index of shards, atomically. files: {tensor: its file}; entries: further ones."""
    index = {"metadata": dict(metadata), "weight_map": dict(files), **entries}
    atomic_files.write(folder / _index(stem), json.dumps(index, indent=1, sort_keys=True) + "\n")


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def damage(
    artifact: Artifact, subfolder: str, moments: bool, share: tuple[int, int] = (0, 1), progress: Progress = no_progress
) -> str | None:
    """Hashes the files of a checkpoint that are about to be read.

    Opening an artifact compares only sizes, and its digests are those of what was written, not of what the disk has
    now.

    Args:
        artifact: The artifact.
        subfolder: Its folder with the checkpoint; empty: the artifact is the checkpoint.
        moments: Whether the optimizer's files are read, too.
        share: (rank, ranks), for ranks that each hash some of the files.
        progress: Gets the bytes that are hashed, from several threads.

    Returns:
        One sentence on the first damaged file; None without any.
    """

    def is_read(path: str) -> bool:
        return moments or not Path(path).name.startswith(OPTIMIZER)

    try:
        artifact.verify(subfolder, is_read, share, progress)
        return None
    except CheckFailed as error:
        return f"{error}; take it from a copy, or remove {artifact.path} and run again to rebuild it"


def weights_of(artifact: Artifact, step: int | None = None) -> Tensors:
    """The weights of a sealed checkpoint: of a step, or of the last one. Their files are hashed before.

    Raises AtomError if the artifact has no such step, or if a file is damaged.
    """
    steps = steps_of(artifact.path)
    if not steps or (step is not None and step not in steps):
        raise AtomError(f"artifact {artifact.key} has no sealed checkpoint of step {step}; it has {steps}")
    name = name_of(steps[-1] if step is None else step)
    if (sentence := damage(artifact, name, moments=False)) is not None:
        raise AtomError(sentence)
    return Tensors(artifact / name)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint's model or optimizer, or of an exported model, each read on access.

    A file is open only while it is read: pages that a reader has seen would otherwise count as its memory.
    Raises AtomError if a file is missing or damaged, or if an index does not add up with its files.
    """

    def __init__(self, folder: Path, stem: str = MODEL, progress: Progress = no_progress) -> None:
        self.progress = progress  # gets the bytes of each tensor that is read
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
                # Files and index come from strangers too: either could name what the other lacks.
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

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            with _open(path) as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        self.progress(tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes)


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes one safetensors file whose bytes depend only on the tensors. Returns its SHA-256.

    Raises MachineError if the write fails.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return tensor_file.write(path, shapes, tensors.__getitem__)[1]


def _unreadable(path: Path, error: Exception) -> AtomError:
    return AtomError(f"checkpoint {path} cannot be read ({error}); remove its artifact and run again")


def load_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state
