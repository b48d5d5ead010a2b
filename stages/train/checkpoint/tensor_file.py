"""Writes safetensors files tensor by tensor, and hashes the bytes on their way to the disk.

The bytes are those of the `safetensors` library, which needs all tensors of a file at once and reports no progress.
They depend only on the tensors: its format orders them by type and name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core import atomic_files
from pipeline.core.errors import MachineError
from pipeline.core.store import Progress, no_progress
from stages.train.checkpoint import FLUSH_BYTES

CHUNK_BYTES = 4 * 2**20
"""Bytes that are hashed and written between two reports of progress."""
TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of types, in its order."""

Shape = tuple[int, ...]


def write(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, Shape]],
    read: Callable[[str], Tensor],
    progress: Progress = no_progress,
    durable: bool = False,
) -> tuple[int, str]:
    """Writes one file through a draft, which takes its place at the end. Holds one tensor at a time.

    Args:
        path: The file.
        shapes: Type and shape of each tensor.
        read: Returns a tensor by its name.
        progress: Gets the bytes that are written.
        durable: Whether to flush the file to the disk as it grows, and before it takes its place.

    Returns:
        The size of the file in bytes, and its SHA-256.

    Raises:
        MachineError: The file cannot be written.
    """
    # The digest is computed on the way, so the file is never read back.
    digest, size, unflushed = hashlib.sha256(), 0, 0
    try:
        with atomic_files.replacing(path) as draft, open(draft, "wb", buffering=0) as file:
            for chunk in _chunks(shapes, read):
                _write_all(file.fileno(), chunk)
                digest.update(chunk)
                size += len(chunk)
                unflushed += len(chunk)
                if durable and unflushed >= FLUSH_BYTES:
                    # Else the kernel would keep gigabytes and write them all at the end, during which nothing moves.
                    os.fdatasync(file.fileno())
                    unflushed = 0
                progress(len(chunk))
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error}); make room and run again to go on") from error
    return size, digest.hexdigest()


def _in_order(shapes: Mapping[str, tuple[torch.dtype, Shape]]) -> list[str]:
    """The names of the tensors in the order of the file."""
    rank = {dtype: number for number, dtype in enumerate(TYPES)}
    return sorted(shapes, key=lambda name: (rank[shapes[name][0]], name))


def _header(shapes: Mapping[str, tuple[torch.dtype, Shape]]) -> bytes:
    """The length of the header, and the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in _in_order(shapes):
        dtype, shape = shapes[name]
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The format aligns the data to 8 bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _chunks(
    shapes: Mapping[str, tuple[torch.dtype, Shape]], read: Callable[[str], Tensor]
) -> Iterator[memoryview | bytes]:
    """The bytes of the file, at most `CHUNK_BYTES` at a time."""
    yield _header(shapes)
    for name in _in_order(shapes):
        tensor = read(name).detach().cpu().contiguous()
        if (tensor.dtype, tuple(tensor.shape)) != shapes[name]:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {shapes[name]}")
        # As bytes, since numpy has no bf16 and no FP8.
        data = tensor.flatten().view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Writes all bytes: the system may take fewer at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
