"""Reads untrusted files: with limits on size and depth, and with text that is safe to print.

Everything here raises CheckFailed with one sentence, and reads nothing but regular files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.errors import CheckFailed
from pipeline.core.json_files import READ
from pipeline.core.text import printable

JSON_BYTES = 64 << 20
"""The maximum size of a JSON file."""
HEADER_BYTES = 100_000_000
"""The maximum header of a safetensors file, by the format's own library."""
TENSORS = 1_000_000
"""The maximum number of entries in the header of a safetensors file."""
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""{data type in safetensors: bits of a value}"""


def cleaned(value: Any) -> Any:
    """Applies `printable` to every text in lists, mappings and data classes."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cleaned(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        texts = {field.name: cleaned(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **texts)
    return value


def open_regular(path: Path, follow: bool = False) -> BinaryIO:
    """Opens a regular file and nothing else: no endless device, no pipe that waits for a writer.

    `follow` allows the path to be a link. Raises CheckFailed.
    """
    flags = READ | (0 if follow else os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=follow).st_mode):  # a device is not even opened
            raise CheckFailed(f"{path.name} is not a regular file")
        # The path may lead to another file by now, so the opened file is examined again.
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckFailed(f"{path.name} is not a regular file")
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return os.fdopen(descriptor, "rb")


def read(path: Path, limit: int, follow: bool = False) -> bytes:
    """Returns the bytes of a regular file. Raises CheckFailed for anything else, or for more than `limit` bytes."""
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than allowed shows that a file has grown since its size was read.
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise CheckFailed(f"{path.name} has {max(size, len(data))} bytes, and at most {limit} are read of such a file")
    return data


def parse_json(data: bytes, name: str) -> Any:
    """Parses JSON. Raises CheckFailed, also for a duplicate key, which parsers read differently.

    NaN and infinities are accepted, because training logs may have them.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except RecursionError:  # the parser counts while it reads, and stops
        raise CheckFailed(f"{name} is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise CheckFailed(f"{name} is no JSON that can be read: {error}") from None


def read_json(path: Path, limit: int = JSON_BYTES, follow: bool = False) -> Any:
    return parse_json(read(path, limit, follow), path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands there twice")
    return mapping


def tensor_header(path: Path, follow: bool = False) -> dict[str, dict[str, Any]]:
    """Returns {tensor: {dtype, shape, data_offsets}} of a safetensors file, after checking every number in it.

    The tensors must be contiguous, with the length of shape and dtype, up to the end of the file. Raises CheckFailed
    otherwise.
    """
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise CheckFailed(f"{path.name} is cut: it has no header")
        (length,) = struct.unpack("<Q", length_bytes)
        # The file states the length, so it is checked before that many bytes are read.
        if length > min(size - 8, HEADER_BYTES):
            raise CheckFailed(f"{path.name} says that its header has {length} bytes, which no model's has")
        body = parse_json(file.read(length), f"{path.name}: its header")
    if not isinstance(body, dict) or len(body) > TENSORS:
        raise CheckFailed(f"{path.name}: its header is no table of tensors")
    body.pop("__metadata__", None)

    spans = sorted(_span(path.name, name, entry) for name, entry in body.items())
    end = 0
    # A gap could hide bytes that no tensor has, and an overlap two meanings of the same bytes.
    for begin, stop in spans:
        if begin != end:
            raise CheckFailed(f"{path.name}: its tensors overlap, or leave a gap at byte {end}")
        end = stop
    if 8 + length + end != size:
        raise CheckFailed(f"{path.name} has {size} bytes, and its header declares {8 + length + end}")
    return body


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    """Returns the start and the end of a tensor in the data after the header. Raises CheckFailed."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > 16:
            raise ValueError
        numbers = [begin, end, *shape]
        # Not `isinstance`: `true` is an int for Python.
        if any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers):
            raise ValueError
        bits = DTYPE_BITS[dtype]
        for number in shape:
            bits *= number
        if bits % 8 or bits // 8 != end - begin:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckFailed(f"{file}: its header says of {name} what is true of no tensor") from None
    return begin, end
