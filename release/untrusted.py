"""Lists and reads untrusted files: without following links, within limits on number, size and depth, as safe text.

Everything here raises CheckFailed with one sentence, and reads nothing but regular files.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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


DEPTH = 32
"""The maximum number of folders around a file."""
ENTRIES = 20_000
"""The maximum number of entries below a folder, apart from those that its checksum files allow (`scan`)."""
NAMED = 100
"""The maximum number of refusals that are named individually."""
SPARSE_BYTES = 64 << 20
"""The total size that sparse files may always have."""
CACHED = re.compile(r"(models|datasets)--.+")
"""Names of the folders of repositories in the cache of the Hub's client."""
CLIENTS = re.compile(
    r"\.cache/huggingface/(CACHEDIR\.TAG|\.gitignore(\.lock)?|trees/[0-9a-f]+\.json|"
    r"(download|upload)/.+\.(metadata|lock|incomplete))"
)
"""Files that the Hub's client creates in a download folder."""
CLIENTS_BYTES = 16 << 20
"""The maximum size of such a file."""


@dataclass
class Tree:
    """The files of a folder.

    Attributes:
        files: {path: its status} of the files that may be read.
        refused: A sentence for each other entry, at most NAMED.
        others: The number of entries that have no sentence because there are more than NAMED.
        overflow: Whether there are too many entries to list all.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    others: int = 0
    overflow: bool = False

    def refuse(self, text: str) -> None:
        if len(self.refused) < NAMED:
            self.refused.append(text)
        else:
            self.others += 1


def walk(folder: Path, max_entries: int | None = None) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Yields (relative path, status) of the entries below a folder; an OSError in place of a status that is unreadable.

    Folders are descended into and not yielded, unless they are unreadable or deeper than DEPTH. If there are more than
    `max_entries` entries, "." comes last, with an OSError of E2BIG.
    """
    entry_count = 0
    pending = [""]
    while pending:
        directory = pending.pop()
        try:
            entries = os.scandir(folder / directory)
        except OSError as error:
            yield directory or ".", error
            continue
        with entries:
            for entry in entries:
                entry_count += 1
                # A folder of millions of names would fill the memory.
                if max_entries is not None and entry_count > max_entries:
                    text = f"has more than {max_entries} entries, far more than its checksums name"
                    yield ".", OSError(errno.E2BIG, text)
                    return
                path = f"{directory}/{entry.name}".lstrip("/")
                try:
                    # The status of a link itself; `_blob` looks where links of the Hub's cache lead.
                    status = entry.stat(follow_symlinks=False)
                except OSError as error:
                    yield path, error
                    continue
                if stat.S_ISDIR(status.st_mode) and path.count("/") < DEPTH:
                    pending.append(path)
                else:
                    yield path, status


def scan(folder: Path, listed_count: int) -> Tree:
    """Returns the files of a folder that may be read.

    `listed_count` is the number of files that its checksum files name.
    """
    tree = Tree()
    path_of_name: dict[str, str] = {}
    # Beside the listed files there are folders, signatures and what the Hub's client adds.
    for path, status in walk(folder, ENTRIES + 4 * listed_count):
        if isinstance(status, OSError):
            if status.errno == errno.E2BIG:
                return Tree(refused=[f"{path} {status.strerror}"], overflow=True)
            tree.refuse(f"{path} cannot be read: {status.strerror}")
        elif reason := _refusal(path, status, path_of_name):
            tree.refuse(f"{path} {reason}")
        elif not stat.S_ISLNK(status.st_mode):
            tree.files[path] = status
        elif (blob := _blob(folder, path)) is not None:
            tree.files[path] = blob
        else:
            tree.refuse(f"{path} is a link, not a regular file")
    return tree


def _refusal(path: str, status: os.stat_result, path_of_name: dict[str, str]) -> str:
    """Returns the reason why a path may not be read; "" if it may."""
    try:
        # Names are bytes on Linux, and what is no UTF-8 cannot be printed, listed or compared.
        path.encode()
    except UnicodeEncodeError:
        return "has a name that is no UTF-8"
    if not path.isprintable():
        return "has a name with characters that cannot be printed"
    # On a file system without case, or for a reader, two such names are one.
    if (similar_path := path_of_name.setdefault(unicodedata.normalize("NFKC", path).casefold(), path)) != path:
        return f"has a name that looks like that of {similar_path}"
    is_clients = CLIENTS.fullmatch(path) and stat.S_ISREG(status.st_mode) and status.st_size <= CLIENTS_BYTES
    if ".cache" in path.split("/") and not is_clients:
        return "lies in .cache, where a release keeps nothing and the Hub's client leaves no such file"
    if stat.S_ISDIR(status.st_mode):
        return f"lies more than {DEPTH} folders deep"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        return f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a special file')}, not a regular file"
    return ""


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_sparse(status: os.stat_result) -> bool:
    """Returns True if almost nothing of a file is on the disk; compressing file systems do not reach that ratio."""
    return disk_bytes(status) * 64 < status.st_size


def real_bytes(files: Iterable[os.stat_result]) -> int:
    """Returns the bytes of files on the disk: holes do not count, and a file with several names counts once."""
    return sum({inode(status): min(status.st_size, disk_bytes(status)) for status in files}.values())


def disk_bytes(status: os.stat_result) -> int:
    """Returns the bytes that a file has on the disk."""
    # The unit of `st_blocks` is 512 bytes on every file system.
    return status.st_blocks * 512


def inode(status: os.stat_result) -> tuple[int, int]:
    """Returns the device and the number of a file, which are equal for all names of one file."""
    return status.st_dev, status.st_ino


def is_foreign_link(folder: Path, path: str) -> bool:
    """Returns True if a path is a link, or leads through one, except for links of the Hub client's cache.

    No link is followed.
    """
    parts = path.split("/")
    if any((folder / "/".join(parts[:depth])).is_symlink() for depth in range(1, len(parts))):
        return True
    return (folder / path).is_symlink() and _blob(folder, path) is None


def _blob(folder: Path, path: str) -> os.stat_result | None:
    """Returns the status of the file that a link of the Hub client's cache leads to; None for any other link.

    In the cache, `<repository>/snapshots/<commit>/<path>` links to `<repository>/blobs/<digest>`.
    """
    snapshot = folder.resolve()
    repository = snapshot.parent.parent
    # Not `resolve`, which would follow further links.
    target = Path(os.path.normpath((snapshot / path).parent / os.readlink(folder / path)))
    if snapshot.parent.name != "snapshots" or CACHED.fullmatch(repository.name) is None:
        return None
    if target.parent != repository / "blobs" or target.parent.is_symlink():
        return None
    try:
        status = target.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
