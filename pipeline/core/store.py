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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.json_files import Damaged, printable

MANIFEST = "manifest.json"
# The largest accepted manifest, in bytes: five million files.
MANIFEST_LIMIT = 2**30
# The most threads of a process that hash files at once.
HASH_THREADS = 16
# Bytes that are hashed between two reports of progress.
HASH_CHUNK = 4 * 2**20
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Is called after real work on files, with the bytes that were read, hashed or written since the last call.
Progress = Callable[[int], object]


class _Row(TypedDict):
    path: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Sha256


class _Manifest(TypedDict):
    """The content of manifest.json."""

    key: str
    """name of the folder"""
    digest: Sha256
    """SHA-256 of the canonical JSON of `[[path, size, sha256], …]`"""
    files: list[_Row]
    """the same rows; `path` is relative, with `/`"""


_MANIFEST: TypeAdapter[Any] = TypeAdapter(_Manifest)


def canonical(value: Any) -> bytes:
    """Returns JSON with sorted keys, without spaces, in UTF-8: the byte form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def no_progress(size: int) -> None:
    """Reports progress to nobody."""


def sha256_file(path: Path, progress: Progress = no_progress) -> str:
    """Hashes a file. Raises OSError."""
    # One buffer serves for the whole file, and is no larger than a small file needs.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(HASH_CHUNK, max(2**16, path.stat().st_size))))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            progress(size)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], progress: Progress = no_progress) -> list[str]:
    """Hashes files, several at once, each by one thread. Raises OSError.

    Args:
        paths: The files.
        progress: Is called by several threads.
    """
    threads = max(1, min(HASH_THREADS, len(os.sched_getaffinity(0)), len(paths)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda path: sha256_file(path, progress), paths))


class FileRecord(NamedTuple):
    """The record of a hashed file, by which an unchanged file need not be hashed again.

    Attributes:
        size: Bytes of the file.
        sha256: SHA-256 of its content.
        modified: Time of its last modification, in nanoseconds.
        inode: Number of its inode, which other names of the file share.
    """

    size: int
    sha256: str
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path, sha256: str) -> FileRecord:
        """Returns the record of a file with that SHA-256. Raises OSError."""
        entry = path.stat()
        return cls(entry.st_size, sha256, entry.st_mtime_ns, entry.st_ino)

    def is_unchanged(self, path: Path) -> bool:
        """Returns True if a file has the recorded size, time and inode. Nothing is hashed. Raises OSError."""
        return FileRecord.of(path, self.sha256) == self

    def describes(self, path: Path, progress: Progress = no_progress) -> bool:
        """Returns True if a file has the recorded content. Raises OSError."""
        # It is hashed only if its size is right and its time or inode is not.
        if self.is_unchanged(path):
            return True
        return path.stat().st_size == self.size and sha256_file(path, progress) == self.sha256


# SHA-256 of files that this process hashed or wrote, by device, inode, size and time of change.
_handed_over: dict[tuple[int, int, int, int], str] = {}


def hand_over_hash(path: Path, sha256: str) -> None:
    """Records the SHA-256 of an unchanged file, so that `write_manifest` need not read it again in this process."""
    _handed_over[_version_of(path)] = sha256


def _version_of(path: Path) -> tuple[int, int, int, int]:
    entry = path.stat()
    # A file that was written again or replaced differs in one of these, and its old hash no longer counts.
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns


@dataclass(frozen=True)
class FileRow:
    """A row of a manifest."""

    path: str
    size: int
    sha256: str


def regular_files(folder: Path) -> dict[str, Path]:
    """Returns every regular file below `folder` but its manifest, by its path in it, sorted.

    Raises AtomError on a link or a special file.
    """
    files: dict[str, Path] = {}
    for root, dirs, names in os.walk(folder):
        dirs.sort()
        for name in sorted(dirs) + sorted(names):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AtomError(f"{path} is a link or a special file; an artifact holds regular files only")
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and relative != MANIFEST:
                files[relative] = path
    return dict(sorted(files.items()))


def rows_of(folder: Path, handed_over: bool = False) -> list[FileRow]:
    """Returns the files of `regular_files` with their hashes.

    Args:
        folder: The folder.
        handed_over: Take the hashes that `hand_over_hash` recorded instead of reading those files.
    """
    files = regular_files(folder)
    hashes: dict[str, str] = {}
    for name, path in files.items() if handed_over else ():
        if (sha256 := _handed_over.get(_version_of(path))) is not None:
            hashes[name] = sha256
    unknown = [name for name in files if name not in hashes]
    hashes |= dict(zip(unknown, sha256_files([files[name] for name in unknown]), strict=True))
    return [FileRow(name, path.stat().st_size, hashes[name]) for name, path in files.items()]


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
                if not stat.S_ISREG(entry.st_mode):
                    state = "is no regular file"
                elif entry.st_size != row.size:
                    state = f"has {entry.st_size} bytes instead of {row.size}"
                else:
                    continue
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
        """Returns the remedy for a damaged artifact."""
        return f"restore it from a copy, or `atom gc --delete --include {key}` and run again to make it anew"

    def verify(
        self,
        below: str = "",
        select: Callable[[str], bool] = lambda path: True,
        share: tuple[int, int] = (0, 1),
        progress: Progress = no_progress,
    ) -> None:
        """Hashes files and compares them with the manifest.

        Args:
            below: A folder of the artifact, outside of which nothing is looked at; empty: all of it.
            select: Returns True if the file at that path of the artifact is to be hashed.
            share: (n, m): hashes every m-th of these files, from the n-th on, for a caller that is one of m.
            progress: Gets the bytes that are hashed, from several threads.

        Raises:
            CheckFailed: A file differs or is missing, or one is not in the manifest. Names the first.
        """
        start = f"{below}/" if below else ""
        files = {start + name: path for name, path in regular_files(self.path / below).items()}
        rows = [row for row in self.rows if row.path.startswith(start) and select(row.path)][share[0] :: share[1]]
        # A file of another size differs for certain, so it is not read.
        same_size = [row for row in rows if row.path in files and files[row.path].stat().st_size == row.size]
        hashes = sha256_files([files[row.path] for row in same_size], progress)
        intact = {row.path for row, sha256 in zip(same_size, hashes, strict=True) if sha256 == row.sha256}
        for row in rows:
            if row.path not in intact:
                raise CheckFailed(f"artifact {self.key}: {row.path} is not what its manifest says")
        unlisted = sorted(set(files) - {row.path for row in self.rows})
        if unlisted:
            raise CheckFailed(f"artifact {self.key}: {unlisted[0]} is not in its manifest")


def once(path: Path, make: Callable[[], Any]) -> Any:
    """Returns the JSON value that a work folder keeps; a missing one is computed and written atomically.

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
    """Hashes and flushes every file of a finished folder and writes its manifest.

    A file whose hash was handed over is not read again.
    """
    rows = rows_of(folder, handed_over=True)
    digest = digest_of(rows)
    manifest = {"key": key, "digest": digest, "files": [row.__dict__ for row in rows]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    _share_permissions(folder, (folder / MANIFEST).stat().st_mode & 0o666)
    # After the permissions, so that these are on disk as well.
    flush_tree(folder)
    return Artifact(key, digest, folder, tuple(rows))


def _share_permissions(folder: Path, mode: int) -> None:
    """Gives every file and folder at least the permissions that a new one has here.

    Some libraries write files that only their owner may read.

    Args:
        folder: The folder, with all below it.
        mode: The permissions of a new file, by the umask and the defaults of the folder.
    """
    search = (mode & 0o444) >> 2  # who may read a folder's files may enter it
    for root, _, names in os.walk(folder):
        for path, wanted_mode in [(Path(root), mode | search), *((Path(root, name), mode) for name in names)]:
            if (current_mode := stat.S_IMODE(path.stat().st_mode)) | wanted_mode != current_mode:
                path.chmod(current_mode | wanted_mode)


def flush_tree(folder: Path) -> None:
    """Flushes every file and folder of a folder to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            atomic_files.flush(Path(root, name))
        atomic_files.flush(Path(root))


def _require_key(artifact: Artifact, key: str) -> Artifact:
    if artifact.key != key:
        raise Damaged(artifact.path / MANIFEST, f"it is that of {artifact.key}", Artifact.advice(key))
    return artifact


def home_folder() -> Path:
    """Returns `$ATOM_HOME`, or `runs` in the present folder."""
    return Path(os.environ.get("ATOM_HOME") or "runs").absolute()


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
        """Returns True if a folder of that key exists, which is complete unless it was damaged later."""
        # A link that leads nowhere counts as well: `open` then says that the artifact is damaged.
        return os.path.lexists(self.artifacts / key)

    def open(self, key: str) -> Artifact:
        """Opens a sealed artifact. Raises AtomError if it is missing or damaged."""
        return _require_key(Artifact.open(self.artifacts / key), key)

    def manifest(self, key: str) -> Artifact:
        """Reads the manifest without checking the files. Raises Damaged."""
        return _require_key(Artifact.read(self.artifacts / key), key)

    def damage(self, key: str) -> str | None:
        """Returns one sentence on the damage of an artifact that is visible without hashing; None without any."""
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
        record(artifact)  # before the rename: see above
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
        # The rename is on disk once its folder is.
        atomic_files.flush(self.artifacts)
        return self.open(key)
