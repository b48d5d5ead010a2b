"""Sealed artifacts: a folder of files and `manifest.json`, named by its key, proven by its digest.

The digest is the SHA-256 of the manifest's rows (path, size, sha256 of every file) and of nothing else, so no
clock, host or path can get into it. A folder under `artifacts/` is complete or absent: it is written elsewhere on the
same file system, flushed, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import AtomError, CheckFailed

MANIFEST = "manifest.json"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8: the one byte form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class FileRow:
    path: str
    size: int
    sha256: str


def rows_of(folder: Path, ignore: frozenset[str] = frozenset({MANIFEST})) -> list[FileRow]:
    """Every regular file below `folder`, sorted by path. Raises AtomError on a link or a special file."""
    rows = []
    for root, dirs, names in os.walk(folder):
        dirs.sort()
        for name in sorted(dirs) + sorted(names):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AtomError(f"{path} is a link or a special file; an artifact holds regular files only")
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and relative not in ignore:
                rows.append(FileRow(relative, path.stat().st_size, sha256_file(path)))
    return sorted(rows, key=lambda row: row.path)


def digest_of(rows: list[FileRow]) -> str:
    return sha256_bytes(canonical([[r.path, r.size, r.sha256] for r in rows]))


@dataclass(frozen=True)
class Artifact:
    """A sealed folder. `path / name` are its files; they are read-only by contract."""

    key: str
    digest: str
    path: Path
    rows: tuple[FileRow, ...]

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Opens a sealed folder, checking that every file is there with its size. Hashes are `verify`'s work.

        Raises AtomError if the folder is not sealed or a file is missing or cut short.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            rows = tuple(FileRow(r["path"], r["size"], r["sha256"]) for r in manifest["files"])
        except FileNotFoundError:
            raise AtomError(f"{path} is not a sealed artifact: it has no {MANIFEST}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise AtomError(f"{path / MANIFEST} cannot be read ({error}); remove {path} and run again") from None
        for row in rows:
            try:
                size = (path / row.path).stat().st_size
            except FileNotFoundError:
                size = -1
            if size != row.size:
                state = "is missing" if size < 0 else f"has {size} bytes instead of {row.size}"
                raise AtomError(f"artifact {path.name}: {row.path} {state}; remove {path} and run again to rebuild it")
        digest = digest_of(list(rows))
        if digest != manifest.get("digest"):
            raise AtomError(f"artifact {path.name}: {MANIFEST} was edited; remove {path} and run again to rebuild it")
        return cls(manifest["key"], digest, path, rows)

    def verify(self, below: str = "") -> None:
        """Hashes every file, or every one in the folder `below`. Raises CheckFailed naming the first file that differs,
        or an extra one."""
        start = f"{below}/" if below else ""
        found = {start + row.path: (row.size, row.sha256) for row in rows_of(self.path / below)}
        rows = [row for row in self.rows if row.path.startswith(start)]
        for row in rows:
            if found.get(row.path) != (row.size, row.sha256):
                raise CheckFailed(f"artifact {self.key}: {row.path} is not what its manifest says")
        extra = sorted(set(found) - {row.path for row in rows})
        if extra:
            raise CheckFailed(f"artifact {self.key}: {extra[0]} is not in its manifest")


def once(path: Path, make: Callable[[], Any]) -> Any:
    """A JSON value kept in a work folder, or made now and kept there whole.

    The file begins with the digest of the rest: a damaged one is made again, never believed.
    """
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
        if digest == sha256_bytes(data).encode():
            return json.loads(data)
    except FileNotFoundError:
        pass
    data = json.dumps(make()).encode()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(sha256_bytes(data).encode() + b"\n" + data)
    os.replace(draft, path)
    return json.loads(data)


def write_manifest(folder: Path, key: str) -> Artifact:
    """Hashes and flushes every file of a finished folder and writes its manifest."""
    rows = rows_of(folder)
    digest = digest_of(rows)
    manifest = {"key": key, "digest": digest, "files": [row.__dict__ for row in rows]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for row in [*rows, FileRow(MANIFEST, 0, "")]:
        _flush(folder / row.path)
    for root, _, _ in os.walk(folder):
        _flush(Path(root))
    return Artifact(key, digest, folder, tuple(rows))


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Store:
    """The folder `$ATOM_HOME` (default `./runs`): `artifacts/`, `work/`, `ledger/`, `logs/`, `releases/`."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.artifacts = self.home / "artifacts"
        self.ledger = self.home / "ledger"
        self.logs = self.home / "logs"

    def work(self, key: str) -> Path:
        return self.home / "work" / key

    def sealed(self, key: str) -> bool:
        return (self.artifacts / key / MANIFEST).exists()

    def open(self, key: str) -> Artifact:
        return Artifact.open(self.artifacts / key)

    def seal(self, out: Path, key: str, record: Callable[[Artifact], None]) -> Artifact:
        """Moves a finished folder to `artifacts/<key>` and returns what stands there.

        `record` gets the hashed artifact just before the rename, to write its statement: a kill between the two
        leaves a statement without an artifact, never an artifact without a statement. If another attempt sealed the
        key first, its artifact wins and `out` is discarded. Raises AtomError if the two digests differ.
        """
        made = write_manifest(out, key)
        record(made)
        self.artifacts.mkdir(parents=True, exist_ok=True)
        target = self.artifacts / key
        try:
            os.rename(out, target)
        except OSError:
            if not self.sealed(key):
                raise
            shutil.rmtree(out)
            first = self.open(key)
            if first.digest != made.digest:
                raise AtomError(
                    f"{key} was sealed twice at once with different digests ({first.digest[:12]} stands, "
                    f"{made.digest[:12]} was discarded); compare their statements in {self.ledger / key}"
                ) from None
            return first
        _flush(self.artifacts)
        return self.open(key)
