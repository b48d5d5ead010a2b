"""SHA-256 of the files of sources, and the digest of all files of a source.

The SHA-256 is computed once for each version of a file and recorded under `$ATOM_HOME/digests`. A version is a size, a
time of the last change, an inode and a time of the last change of the inode. There is one record for each folder of
files, `<sha256 of its path>.json`. It is a cache: without it, the files are read again.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.bounds import Words
from pipeline.core.json_files import Damaged
from pipeline.core.store import canonical, home_folder, sha256_bytes, sha256_file

# Age of a file before it is recorded: a change within the resolution of a file system's clock would not show.
SETTLED_SECONDS = 2.0
# Seconds between two records of a folder that is being hashed.
SAVE_SECONDS = 30.0
TreeDigest = Annotated[str, Words(71, "digest: write auto, or sha256:<64 hex digits>", r"auto|sha256:[0-9a-f]{64}")]
Version = tuple[int, int, int, int]


class _Record(TypedDict):
    """The record of a folder.

    Attributes:
        folder: The folder of the files.
        files: The numbers of a version and the SHA-256 of each, by name.
    """

    folder: str
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9]{1,20}( [0-9]{1,20}){3} [0-9a-f]{64}$")]]


_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of each file."""
    digests: list[str] = []
    for folder, files in groupby(paths, key=lambda path: path.parent):
        digests += _digests_in(folder, list(files))
    return digests


def _digests_in(folder: Path, paths: Sequence[Path]) -> list[str]:
    recorded, new, digests = _read(folder), dict[str, tuple[Version, str]](), []
    saved = time.monotonic()
    for path in paths:
        version = _version(path)
        known_version, digest = recorded.get(path.name, (None, ""))
        if known_version != version:
            digest = _digest_of_version(path, version)
            new[path.name] = version, digest
        digests.append(digest)
        # A kill while a large corpus is hashed loses half a minute.
        if new and time.monotonic() - saved > SAVE_SECONDS:
            _save(folder, new)
            new, saved = {}, time.monotonic()
    if new:
        _save(folder, new)
    return digests


# Remembered in the process too, where no record can be written.
@cache
def _digest_of_version(path: Path, version: Version) -> str:
    return sha256_file(path)


def _version(path: Path) -> Version:
    entry = path.stat()
    # With ctime, since a program can set the time of modification back, but not that of change.
    return entry.st_size, entry.st_mtime_ns, entry.st_ino, entry.st_ctime_ns


def _path(folder: Path) -> Path:
    # Named by a hash, since a path may be too long for the name of a file.
    return home_folder() / "digests" / f"{sha256_bytes(os.fsencode(folder.absolute()))}.json"


def _read(folder: Path) -> dict[str, tuple[Version, str]]:
    if not home_folder().is_dir():
        return {}
    path = _path(folder)
    try:
        record = json_files.read(path, _RECORD)
    except FileNotFoundError:
        return {}
    except Damaged as error:
        json_files.report(error, "the files are hashed again")
        return {}
    return {name: _parse(entry) for name, entry in record["files"].items()}


def _parse(entry: str) -> tuple[Version, str]:
    size, modified, inode, changed, digest = entry.split()
    return (int(size), int(modified), int(inode), int(changed)), digest


def _save(folder: Path, new: dict[str, tuple[Version, str]]) -> None:
    """Adds to the record of a folder those files that are unchanged since they were hashed, and for long enough."""
    # A file that changes within the resolution of the clock would keep its recorded version.
    limit = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    settled = {name: entry for name, entry in new.items() if max(entry[0][1], entry[0][3]) < limit}
    # It may have changed while it was read.
    unchanged = {name: entry for name, entry in settled.items() if _version(folder / name) == entry[0]}
    if not unchanged or not home_folder().is_dir():  # a command without a run leaves nothing behind
        return
    entries = {**_read(folder), **unchanged}
    files = {name: " ".join(map(str, (*version, digest))) for name, (version, digest) in entries.items()}
    path = _path(folder)
    try:
        path.parent.mkdir(exist_ok=True)
        atomic_files.write(path, json.dumps({"folder": str(folder.absolute()), "files": files}) + "\n")
    except OSError as error:
        warnings.warn(f"digests are not recorded ({error}), so the files are hashed again", stacklevel=2)


def tree_digest(files: Iterable[tuple[str, str]]) -> str:
    """Returns `sha256:` over the (relative path, digest) of the files, in their order."""
    return f"sha256:{sha256_bytes(canonical([list(row) for row in files]))}"
