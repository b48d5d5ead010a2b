"""Sealed artifacts: a folder of files and `manifest.json`, named by its key, proven by its digest.

The digest is the SHA-256 of the manifest's rows (path, size, sha256 of every file) and of nothing else, so no
clock, host or path enters it. A folder under `artifacts/` is complete or absent: it is written elsewhere on the same
file system, flushed, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.json_files import Damaged, printable
from pipeline.core.os_errors import misplaced_file

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**30
"""The largest accepted manifest, in bytes: five million files."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Row(TypedDict):
    path: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Sha256


class _Manifest(TypedDict):
    key: str
    digest: Sha256
    files: list[_Row]


_MANIFEST: TypeAdapter[Any] = TypeAdapter(_Manifest)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, without spaces, in UTF-8: the byte form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


_handed_over: dict[tuple[int, int, int, int], str] = {}
"""SHA-256 of files that were hashed when their part was sealed, by device, inode, size and time of change."""


def hand_over_hash(path: Path, sha256: str) -> None:
    """Records the SHA-256 of an unchanged file, so that `write_manifest` need not read it again in this process."""
    _handed_over[_version_of(path)] = sha256


def _version_of(path: Path) -> tuple[int, int, int, int]:
    entry = path.stat()
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns


@dataclass(frozen=True)
class FileRow:
    path: str
    size: int
    sha256: str


def rows_of(folder: Path, ignore: frozenset[str] = frozenset({MANIFEST}), handed_over: bool = False) -> list[FileRow]:
    """Every regular file below `folder`, sorted by path. Raises AtomError on a link or a special file.

    handed_over: take the hashes that `hand_over_hash` recorded instead of reading those files.
    """
    rows = []
    for root, dirs, names in os.walk(folder):
        dirs.sort()
        for name in sorted(dirs) + sorted(names):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AtomError(f"{path} is a link or a special file; an artifact holds regular files only")
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and relative not in ignore:
                sha256 = (_handed_over.get(_version_of(path)) if handed_over else None) or sha256_file(path)
                rows.append(FileRow(relative, path.stat().st_size, sha256))
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
        """Opens a sealed folder and checks the existence and size of every file. `verify` checks the hashes.

        Raises AtomError if the folder is not sealed or a file is missing or cut short.
        """
        artifact = cls.read(path)
        for row in artifact.rows:
            try:
                entry = (path / row.path).stat()
            except FileNotFoundError:
                state = "is missing"
            except OSError as error:
                state = f"cannot be read ({error.strerror})"
            else:
                if stat.S_ISREG(entry.st_mode) and entry.st_size == row.size:
                    continue
                regular = stat.S_ISREG(entry.st_mode)
                state = f"has {entry.st_size} bytes instead of {row.size}" if regular else "is no regular file"
            raise AtomError(f"artifact {path.name}: {printable(row.path)} {state}; {cls.advice(path.name)}")
        return artifact

    @classmethod
    def read(cls, path: Path) -> Artifact:
        """Reads the manifest of a folder without checking the files. Raises Damaged."""
        manifest_path = path / MANIFEST
        try:
            manifest = json_files.read(manifest_path, _MANIFEST, MANIFEST_LIMIT)
        except FileNotFoundError:
            raise Damaged(manifest_path, "it is missing", f"{path} is not a sealed artifact") from None
        except Damaged as error:
            raise Damaged(manifest_path, error.why, cls.advice(path.name)) from error
        rows = tuple(FileRow(**row) for row in manifest["files"])
        if digest_of(list(rows)) != manifest["digest"] or any("\0" in row.path for row in rows):
            raise Damaged(manifest_path, "it was edited", cls.advice(path.name))
        return cls(manifest["key"], manifest["digest"], path, rows)

    @staticmethod
    def advice(key: str) -> str:
        """The remedy for a damaged artifact."""
        return f"restore it from a copy, or `atom gc --delete --include {key}` and run again to make it anew"

    def verify(self, below: str = "") -> None:
        """Hashes every file, or every file in the folder `below`. Raises CheckFailed with the first file that differs
        or is not in the manifest."""
        start = f"{below}/" if below else ""
        files = {start + row.path: (row.size, row.sha256) for row in rows_of(self.path / below)}
        rows = [row for row in self.rows if row.path.startswith(start)]
        for row in rows:
            if files.get(row.path) != (row.size, row.sha256):
                raise CheckFailed(f"artifact {self.key}: {row.path} is not what its manifest says")
        unlisted = sorted(set(files) - {row.path for row in rows})
        if unlisted:
            raise CheckFailed(f"artifact {self.key}: {unlisted[0]} is not in its manifest")


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value that a work folder keeps; a missing one is computed and written atomically.

    The file begins with the digest of the rest: a damaged file is never used and its value is computed again.
    """
    try:
        with json_files.open_file(path) as file:
            digest, _, data = file.read().partition(b"\n")
        if digest == sha256_bytes(data).encode():
            return json.loads(data)
    except FileNotFoundError:
        pass
    data = json.dumps(make()).encode()
    atomic_files.write(path, sha256_bytes(data).encode() + b"\n" + data)
    return json.loads(data)


def write_manifest(folder: Path, key: str) -> Artifact:
    """Hashes and flushes every file of a finished folder and writes its manifest."""
    rows = rows_of(folder, handed_over=True)
    digest = digest_of(rows)
    manifest = {"key": key, "digest": digest, "files": [row.__dict__ for row in rows]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    _share_permissions(folder, (folder / MANIFEST).stat().st_mode & 0o666)
    flush_tree(folder)
    return Artifact(key, digest, folder, tuple(rows))


def _share_permissions(folder: Path, mode: int) -> None:
    """Sets the permissions of every file to those of a new file here, by umask and the folder's defaults: some
    libraries write files that only their owner may read."""
    search = (mode & 0o444) >> 2
    for root, _, names in os.walk(folder):
        for path, wanted_mode in [(Path(root), mode | search), *((Path(root, name), mode) for name in names)]:
            if (current_mode := stat.S_IMODE(path.stat().st_mode)) | wanted_mode != current_mode:
                path.chmod(current_mode | wanted_mode)


def flush_tree(folder: Path) -> None:
    """Flushes every file and folder of a folder to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _flush(Path(root, name))
        _flush(Path(root))


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _require_key(artifact: Artifact, key: str) -> Artifact:
    if artifact.key != key:
        raise Damaged(artifact.path / MANIFEST, f"it is that of {artifact.key}", Artifact.advice(key))
    return artifact


KEYS = 2
"""The version of key computation: 2 since the settings and nodes have their present names."""
KEY_VERSION = "key-version"
"""The file of the home with the KEYS of its latest run."""


def home_folder() -> Path:
    """`$ATOM_HOME`, or `runs` in the present folder."""
    return Path(os.environ.get("ATOM_HOME") or "runs").absolute()


class Store:
    """The folder `$ATOM_HOME` (default `./runs`): `artifacts/`, `work/`, `ledger/`, `logs/`, `releases/`."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.artifacts = self.home / "artifacts"
        self.ledger = self.home / "ledger"
        self.logs = self.home / "logs"

    def misplaced(self) -> str | None:
        """One sentence on a file in the place of a folder of the home; None without one."""
        folders = (self.home / "work", self.artifacts, self.ledger, self.logs)
        return next(filter(None, map(misplaced_file, folders)), None)

    def earlier_keys(self) -> str | None:
        """One sentence if this home has artifacts from an earlier computation of keys; None otherwise."""
        try:
            if self._key_version() == str(KEYS) or not any(self.artifacts.iterdir()):
                return None
        except OSError:  # no home yet, or an unreadable one, which its readers report
            return None
        return (
            f"{self.home} was filled by an earlier version of atom, and keys have changed since: artifacts with "
            "another key now are made again, and releases that were built stay valid; set ATOM_HOME to keep both apart"
        )

    def mark_keys(self) -> None:
        """Records the present version of key computation in this home."""
        if self._key_version() != str(KEYS):
            (self.home / KEY_VERSION).write_text(f"{KEYS}\n")

    def _key_version(self) -> str:
        try:
            return (self.home / KEY_VERSION).read_bytes()[:20].decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def work(self, key: str) -> Path:
        return self.home / "work" / key

    def sealed(self, key: str) -> bool:
        """Whether a folder of that key exists, which is complete unless it was damaged later."""
        return os.path.lexists(self.artifacts / key)

    def open(self, key: str) -> Artifact:
        """Opens a sealed artifact. Raises AtomError if it is missing or damaged."""
        return _require_key(Artifact.open(self.artifacts / key), key)

    def manifest(self, key: str) -> Artifact:
        """Reads the manifest without checking the files. Raises Damaged."""
        return _require_key(Artifact.read(self.artifacts / key), key)

    def damage(self, key: str) -> str | None:
        """One sentence on the damage of an artifact that is visible without hashing; None without any."""
        try:
            self.open(key)
        except AtomError as error:
            return str(error)
        return None

    def seal(self, out: Path, key: str, record: Callable[[Artifact], None]) -> Artifact:
        """Moves a finished folder to `artifacts/<key>` and returns the artifact there.

        `record` gets the hashed artifact just before the rename, to write its statement: a kill between the two
        leaves a statement without an artifact, never an artifact without a statement. If another attempt sealed the
        key first, its artifact wins and `out` is discarded. Raises AtomError if the two digests differ.
        """
        artifact = write_manifest(out, key)
        record(artifact)
        self.artifacts.mkdir(parents=True, exist_ok=True)
        target = self.artifacts / key
        try:
            os.rename(out, target)
        except OSError:
            if not self.sealed(key):
                raise
            shutil.rmtree(out)
            sealed = self.open(key)
            if sealed.digest != artifact.digest:
                raise AtomError(
                    f"{key} was sealed twice at once with different digests ({sealed.digest[:12]} stands, "
                    f"{artifact.digest[:12]} was discarded); compare their statements in {self.ledger / key}"
                ) from None
            return sealed
        _flush(self.artifacts)
        return self.open(key)
