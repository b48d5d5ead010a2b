"""The files of a folder that nobody vouches for: listed within limits, links not followed, nothing opened."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEPTH = 32
ENTRIES = 20_000
"""What may lie in a folder whose checksum files are small."""
NAMED = 100
"""Refusals that are named one by one."""
SPARSE_BYTES = 64 << 20
"""A file up to this size may have holes."""
CACHED = re.compile(r"(models|datasets)--.+")
CLIENTS = re.compile(
    r"\.cache/huggingface/(CACHEDIR\.TAG|\.gitignore(\.lock)?|trees/[0-9a-f]+\.json|"
    r"(download|upload)/.+\.(metadata|lock|incomplete))"
)
"""What the Hub's client leaves in a folder into which it downloads."""
CLIENTS_BYTES = 16 << 20


@dataclass
class Tree:
    """files: {path: its status} of all that may be read; refused: a sentence for everything else but links, which no
    checksum file can list; overflow: whether so much lies there that not all was listed."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    overflow: bool = False


def walk(folder: Path, most: int | None = None) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """(path, status) of everything below a folder but readable folders, at most DEPTH levels deep, the path relative
    and as POSIX writes it. A folder that is deeper or cannot be read comes as itself, and "." after `most` entries."""
    seen = 0
    waiting = [""]
    while waiting:
        place = waiting.pop()
        try:
            entries = os.scandir(folder / place)
        except OSError as error:
            yield place or ".", error
            continue
        with entries:
            for entry in entries:
                seen += 1
                if most is not None and seen > most:
                    yield ".", OSError(errno.E2BIG, f"has more than {most} entries, far more than its checksums name")
                    return
                path = f"{place}/{entry.name}".lstrip("/")
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError as error:
                    yield path, error
                    continue
                if stat.S_ISDIR(status.st_mode) and path.count("/") < DEPTH:
                    waiting.append(path)
                else:
                    yield path, status


def scan(folder: Path, listed: int) -> Tree:
    """What of a folder may be read. listed: how many files its checksum files can name, by their sizes."""
    tree = Tree()
    spelled: dict[str, str] = {}
    for path, status in walk(folder, ENTRIES + 4 * listed):
        if isinstance(status, OSError):
            tree.overflow = tree.overflow or status.errno == errno.E2BIG
            tree.refused.append(f"{path} cannot be read: {status.strerror}")
        elif why := _refusal(path, status, spelled):
            tree.refused.append(f"{path} {why}")
        elif not stat.S_ISLNK(status.st_mode):
            tree.files[path] = status
        elif not is_foreign_link(folder, path):
            tree.files[path] = os.stat(folder / path)
    return tree


def _refusal(path: str, status: os.stat_result, spelled: dict[str, str]) -> str:
    """Why a path may not be read; "" if it may."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "has a name that is no UTF-8"
    if not path.isprintable():
        return "has a name with characters that cannot be printed"
    if (other := spelled.setdefault(unicodedata.normalize("NFC", path), path)) != path:
        return f"has a name that looks like that of {other}"
    if ".cache" in path.split("/") and (
        not CLIENTS.fullmatch(path) or not stat.S_ISREG(status.st_mode) or status.st_size > CLIENTS_BYTES
    ):
        return "lies in .cache, where a release keeps nothing and the Hub's client leaves no such file"
    if stat.S_ISDIR(status.st_mode):
        return f"lies more than {DEPTH} folders deep"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        return f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a special file')}, not a regular file"
    return ""


_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def is_sparse(status: os.stat_result) -> bool:
    """Whether next to nothing of a large file is on the disk; file systems that compress do not come that far."""
    return status.st_size > SPARSE_BYTES and status.st_blocks * 512 * 64 < status.st_size


def is_foreign_link(folder: Path, path: str) -> bool:
    """Whether a path is a link that is none of the Hub client's cache: from `<repository>/snapshots/<commit>` into its
    `blobs`."""
    if not (folder / path).is_symlink():
        return False
    snapshot, target = folder.resolve(), Path(os.path.realpath(folder / path))
    repository = snapshot.parent.parent
    inside = snapshot.parent.name == "snapshots" and target.parent == repository / "blobs"
    return not (inside and CACHED.fullmatch(repository.name) is not None and target.is_file())
