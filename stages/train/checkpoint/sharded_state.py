"""The sharded state of a work checkpoint: each rank's pieces, readable by any layout.

A rank writes `rank-<n>.safetensors` with `<kind>.<tensor name>` for each piece that its optimizer owns, flat and
fp32, and `rank-<n>.json` with the positions of the pieces in the full tensors. Nothing is gathered from other ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.store import Progress, no_progress
from stages.mcore.tensor_sharding import Box, cut, paste
from stages.train.checkpoint import tensor_file
from stages.train.engine import Piece

Location = tuple[str, int, int]
"""File, and the range of the flat local tensor in it."""


def write(
    folder: Path, rank: int, pieces: list[Piece], tensors: Mapping[str, Tensor], progress: Progress = no_progress
) -> None:
    """Writes and flushes a rank's two files; the JSON comes last and marks the other as complete."""
    path = folder / f"rank-{rank:05d}.safetensors"
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    size, sha256 = tensor_file.write(path, shapes, tensors.__getitem__, progress, durable=True)
    receipt = {"size": size, "sha256": sha256, "pieces": {p.name: [p.boxes, p.start, p.stop] for p in pieces}}
    # Last and durable: whoever sees it may rely on the tensors.
    atomic_files.write(path.with_suffix(".json"), json.dumps(receipt), durable=True)


def receipts(folder: Path, world: int) -> dict[str, dict[str, Any]] | None:
    """The receipts of all ranks by file; None until all ranks have written."""
    paths = [folder / f"rank-{rank:05d}.json" for rank in range(world)]
    # One listing in place of a look for the file of each rank, as this is asked again and again.
    present = set(os.listdir(folder))
    if any(path.name not in present for path in paths):
        return None
    return {path.with_suffix(".safetensors").name: json.loads(path.read_text()) for path in paths}


class ShardReader:
    """Reads full tensors or pieces of them from the files of all ranks."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]], progress: Progress = no_progress) -> None:
        """A reader by the receipts of files; `progress` gets the bytes that are read."""
        self.folder, self.progress = folder, progress
        self.locations: dict[str, dict[tuple[Box, ...], list[Location]]] = {}
        for file, receipt in files.items():
            for name, (parts, start, stop) in receipt["pieces"].items():
                key = tuple(tuple((a, b) for a, b in box) for box in parts)
                self.locations.setdefault(name, {}).setdefault(key, []).append((file, start, stop))
        self.open: dict[str, Any] = {}

    def read(self, kind: str, piece: Piece) -> Tensor:
        """The flat values of a piece of any layout."""
        # The usual case: the layout has the same cuts, and a range of a local tensor is read.
        if piece.boxes in self.locations[piece.name]:
            return self._local(kind, piece.name, piece.boxes, piece.start, piece.stop)
        # The boxes of all ranks together reach the ends of the full tensor.
        shape = tuple(
            max(box[d][1] for parts in self.locations[piece.name] for box in parts) for d in range(len(piece.boxes[0]))
        )
        return cut(self.full(kind, piece.name, shape), piece.boxes).flatten()[piece.start : piece.stop]

    def full(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """The full tensor. Raises AtomError if the ranks' pieces do not cover it."""
        # NaN shows what no rank has written, if the count below should ever miss it.
        tensor = torch.full(shape, torch.nan)
        covered = 0
        for parts in self.locations[name]:
            size = sum(torch.Size([b - a for a, b in box]).numel() for box in parts)
            rows = sum(box[0][1] - box[0][0] for box in parts)
            local = self._local(kind, name, parts, 0, size)
            paste(tensor, parts, local.view(rows, *(b - a for a, b in parts[0][1:])))
            covered += size
        if covered != tensor.numel():
            raise AtomError(
                f"work checkpoint {self.folder} holds {covered} of {tensor.numel()} values of {name}; "
                f"remove it to go on from the one before"
            )
        return tensor

    def _local(self, kind: str, name: str, parts: tuple[Box, ...], start: int, stop: int) -> Tensor:
        """A range of the flat local tensor with these boxes, concatenated from the ranks that own parts of it."""
        slices, position = [], start
        # Several ranks may own the same range, such as a norm; the first one is read.
        for file, first, last in sorted(self.locations[name][parts], key=lambda w: (w[1], w[0])):
            if first <= position < last:
                end = min(last, stop)
                part = self._file(file).get_slice(f"{kind}.{name}")[position - first : end - first]
                self.progress(part.nbytes)
                slices.append(part)
                position = end
            if position >= stop:
                break
        if position < stop:
            raise AtomError(
                f"work checkpoint {self.folder} lacks values {position} to {stop} of {name}; "
                f"remove it to go on from the one before"
            )
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def _file(self, name: str) -> Any:
        if name not in self.open:
            self.open[name] = safe_open(self.folder / name, framework="pt")
        return self.open[name]
