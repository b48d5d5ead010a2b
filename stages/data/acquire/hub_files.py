"""Files of dataset repositories of the Hub: the lock file that pins them, and pulling them.

For a source with files on this machine, the lock file has their tree digest, and what a sample of them says.

`atom pin` writes the lock file beside a data recipe from what the Hub states: for each source its revision, and the
size and digest of every file. So plans need no network, and keys are known before a byte is pulled. A digest is that of
git-lfs, `sha256:…`, or the id of a blob for a file that git holds itself, `git:…`. Pulled files are compared with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from textwrap import indent
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from pipeline.core import atomic_files
from pipeline.core.bounds import MOST_SOURCES, Line, Sha256, SourceName, Words
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.lease import Lease
from pipeline.core.stage import Config
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped, printable, shown
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import LOCK_BYTES, explain
from pipeline.hub.client import RemoteRepository, api, endpoint, is_unsafe, online, translate_errors
from pipeline.hub.limits import Slot
from stages.data.acquire.readers.base import MAX_ENTRIES
from stages.data.acquire.source_probe import Count, Probe

DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
COMMIT = r"[0-9a-f]{40}"
HEADER = """\
# Written by `atom pin`: what the Hub states of each source of the data recipe. Lines of `files`: digest, bytes, path.
# `local`: sources whose files are on this machine.
"""
# The last line, which marks the end of a document of YAML: a file that is cut short lacks it, and may be YAML.
END = "...\n"
# Values of a lock file: a thousand sources with their probes.
LOCK_VALUES = 1_000_000

Commit = Annotated[str, Words(40, "commit of 40 hex digits", COMMIT)]
# Seconds between two looks at a file that another process pulls.
POLL = 1.0
# Bytes of a file; a Hub that states more is in error.
MOST_BYTES = 10**15


@dataclass(frozen=True)
class LockedFile:
    """A file of a pinned revision.

    Attributes:
        path: In its repository.
        size: In bytes.
        digest: `sha256:…`, or `git:…` of a small file.
    """

    path: str
    size: int
    digest: str

    @property
    def hex(self) -> str:
        return self.digest.partition(":")[2]

    def digest_of(self, path: Path) -> str:
        """Returns the digest of a local file, of the kind that this file has here."""
        if self.digest.startswith("sha256:"):
            return f"sha256:{sha256_file(path)}"
        with open(path, "rb") as file:
            # git hashes a blob with its length before it.
            sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            while chunk := file.read(1 << 20):
                sha1.update(chunk)
        return f"git:{sha1.hexdigest()}"


class LockedSource(Config):
    """A source of the Hub as it was pinned."""

    repo: Line
    """dataset repository"""
    requested: Line
    """`revision` of the reader when it was pinned"""
    revision: Commit
    """commit of 40 hex digits"""
    pattern: Line
    """`pattern` of the reader when it was pinned"""
    files: str
    """a line for each file, sorted by path: digest, bytes, path"""
    probe: Probe | None = None
    """what a sample of the files says; null: none was read"""

    @property
    def place(self) -> str:
        """The repository and its commit, for people."""
        return f"{self.repo}@{self.revision[:12]}"

    @property
    def content(self) -> tuple[str, ...]:
        """The fields by which entries of the same files are equal."""
        return self.repo, self.files

    @property
    def file_count(self) -> int:
        return len(self.rows())

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.rows())

    def rows(self) -> list[LockedFile]:
        """Returns the files, sorted by path. Raises ValueError naming a line that `atom pin` did not write."""
        return _rows(self.files)

    def require_rows(self, title: str) -> None:
        """Raises RecipeError for a line that `atom pin` did not write."""
        try:
            self.rows()
        except ValueError as error:
            raise RecipeError(f"{title}: {error}") from None


@lru_cache(maxsize=MOST_SOURCES)
def _rows(text: str) -> list[LockedFile]:
    files = []
    for line in text.splitlines():
        digest, size, path = [*line.split(" ", 2), "", ""][:3]
        # A lock file may come from a stranger: a path must not leave the folder of pulled files.
        if not DIGEST.fullmatch(digest) or not re.fullmatch("[0-9]{1,16}", size) or is_unsafe(path):
            raise ValueError(f"{shown(line)} is no line of digest, bytes and path")
        files.append(LockedFile(path, int(size), digest))
    return sorted(files, key=lambda file: file.path)


class LocalSource(Config):
    """A source with files on this machine, as they were when it was probed."""

    place: ClassVar = "files here"

    tree_digest: Sha256
    """tree digest of the files; with another one the probe counts as none"""
    file_count: Count
    """number of files"""
    bytes: Count
    """their bytes"""
    probe: Probe | None = None
    """what a sample of the files says; null: none was read"""

    @property
    def content(self) -> tuple[str, ...]:
        """The fields by which entries of the same files are equal."""
        return (self.tree_digest,)


class LockFile(Config):
    """The pinned sources of a data recipe, by their names."""

    sources: Annotated[dict[SourceName, LockedSource], Field(max_length=MOST_SOURCES)]
    """pinned sources of the Hub"""
    local: dict[SourceName, LocalSource] = Field(default={}, max_length=MOST_SOURCES)
    """probed sources with files on this machine"""


def read(path: Path) -> Mapping[str, LockedSource]:
    """Returns the pinned sources of the Hub in a lock file, by name; none if there is no such file.

    Raises RecipeError if it is damaged.
    """
    return _read(path).sources


def read_local(path: Path) -> Mapping[str, LocalSource]:
    """Returns the sources on this machine in a lock file, by name, as `read`."""
    return _read(path).local


def _read(path: Path) -> LockFile:
    try:
        entry = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return LockFile(sources={})
    # The version is part of the cache's key, so a lock file that was written anew is read anew.
    return _read_version(path, (entry.st_ino, entry.st_size, entry.st_mtime_ns))


@lru_cache(maxsize=8)
def _read_version(path: Path, version: tuple[int, int, int]) -> LockFile:
    title = f"lock file {escaped(path.name, 80)}"
    try:
        content = read_file(path, title, LOCK_BYTES)
        raw = parse_yaml(content, title, LOCK_VALUES)
        try:
            lock = LockFile.model_validate(raw)
        except ValidationError as error:
            raise explain(error, LockFile, title, raw) from None
        for name, source in lock.sources.items():
            source.require_rows(f"{title}: source {name}")
        if not content.endswith(END.encode()):
            raise RecipeError(f"{title}: does not end with the line `...`, so it is cut short")
    except RecipeError as error:
        # Never written over: it has the commits that were pinned, and newer ones are other data.
        raise RecipeError(f"{error}; restore it, or remove it and pin anew by `atom pin RECIPE`") from None
    return lock


def write(path: Path, entries: Mapping[str, LockedSource | LocalSource]) -> None:
    """Replaces a lock file. Raises RecipeError if its folder cannot be written."""
    text = [HEADER]
    for section, kind in (("sources", LockedSource), ("local", LocalSource)):
        sources = {name: entry for name, entry in sorted(entries.items()) if isinstance(entry, kind)}
        text.append(f"{section}:\n" if sources else f"{section}: {{}}\n")
        for name, source in sources.items():
            text += [f"  {name}:\n", *_lines_of(source)]
    text.append(END)
    try:
        atomic_files.write(path, "".join(text))
    except OSError as error:
        raise RecipeError(
            f"{escaped(str(path), 200)} cannot be written ({error.strerror}); copy the data recipe to a folder of "
            "yours, and name it by its path"
        ) from None


def _lines_of(source: LockedSource | LocalSource) -> Iterator[str]:
    """Yields the lines of an entry."""
    for field, value in source.model_dump(exclude={"files", "probe"}).items():
        yield f"    {field}: {json.dumps(value, ensure_ascii=False)}\n"
    if source.probe:
        # JSON is YAML, and quotes what YAML would take for something else than text.
        probe = json.dumps(source.probe.model_dump(exclude_defaults=True), ensure_ascii=False, indent=2)
        yield f"    probe: {indent(probe, '      ').lstrip()}\n"
    if isinstance(source, LockedSource):
        # A line for each file, so that a diff shows which files another revision has changed.
        yield "    files: |\n"
        yield from (f"      {line}\n" for line in source.files.splitlines())


def resolve(name: str, repo: str, revision: str, pattern: str) -> LockedSource:
    """Asks the Hub for a source: the commit of its revision, and the files that match the pattern.

    Raises AtomError.
    """
    remote, title = RemoteRepository(repo, "dataset"), f"source {name}: {repo}@{revision}"
    with translate_errors(f"pinning {title}"):
        commit = remote.commit(revision)
        entries = remote.files(commit)
    # A Hub that answers with another commit would pin other files than the recipe names.
    if not re.fullmatch(COMMIT, commit) or (re.fullmatch(COMMIT, revision) and commit != revision):
        raise AtomError(
            f"{title}: the Hub answers with the commit {shown(commit)}, which is another; check HF_ENDPOINT"
        )
    files = []
    for path, entry in sorted(entries.items()):
        if fnmatchcase(path, pattern):
            # git-lfs objects have a SHA-256 of 64 digits, small files the SHA-1 of a blob of 40.
            files.append(LockedFile(path, entry.size, f"{'git' if len(entry.id) == 40 else 'sha256'}:{entry.id}"))
            _require_valid(title, files[-1])
    if not files:
        raise RecipeError(f"{title} has no file that matches {pattern!r} among {len(entries)}; set reader.pattern")
    if len(files) > MAX_ENTRIES:
        raise RecipeError(f"{title}: more than {MAX_ENTRIES} files match {pattern!r}; set reader.pattern")
    lines = "".join(f"{file.digest} {file.size} {file.path}\n" for file in files)
    return LockedSource(repo=repo, requested=revision, revision=commit, pattern=pattern, files=lines)


def pull(source: str, locked: LockedSource, file: LockedFile, target: Path, slot: Slot) -> None:
    """Brings a file to `target`, unless it is there already with its digest; waits if another process pulls it.

    `slot` bounds what is read from the Hub.

    Raises AtomError if the Hub does not have it, or has other bytes under its name; MachineError if the Hub does not
    answer, or refuses for now.
    """
    while not _is_intact(file, target):
        # Before the lease of the file: who holds that one must not wait for a slot of those who wait for the file.
        slot.take()
        # Several tasks may need one file; the others wait instead of pulling it again.
        lease = Lease.take(target.parent)
        if lease is None:
            slot.release()
            time.sleep(POLL)
            continue
        try:
            if not _is_intact(file, target):
                # It may have been pulled while this process waited for the lease.
                _download(source, locked, file, target, slot)
            return
        finally:
            lease.release()


def _is_intact(file: LockedFile, path: Path) -> bool:
    try:
        return path.stat().st_size == file.size and file.digest_of(path) == file.digest
    except (FileNotFoundError, NotADirectoryError):
        return False


def _download(source: str, locked: LockedSource, file: LockedFile, target: Path, slot: Slot) -> None:
    name = f"source {source}: {printable(file.path)} of {locked.repo}@{locked.revision[:12]}"
    # Beside the target, so that the last step is a move within one file system.
    draft = target.parent / ".pulling"
    shutil.rmtree(draft, ignore_errors=True)  # what a killed process has left
    if file.size > (free := shutil.disk_usage(target.parent).free):
        raise AtomError(f"{name} has {file.size} bytes, and {target.parent} has room for {free}; make room")
    try:
        with translate_errors(f"pulling {name}"), online():
            pulled = api().download(locked.repo, "dataset", locked.revision, file.path, file.size, draft, slot)
        if (digest := file.digest_of(pulled)) != file.digest:
            raise AtomError(
                f"{name} has the digest {digest} at {endpoint()}, but is pinned to {file.digest}; if the change "
                "is right, pin it anew by `atom pin RECIPE`"
            )
        # Only a compared file gets the final name, in one step.
        os.replace(pulled, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _require_valid(title: str, file: LockedFile) -> None:
    """Raises AtomError for a file that no Hub has."""
    if is_unsafe(file.path) or not DIGEST.fullmatch(file.digest) or not 0 <= file.size <= MOST_BYTES:
        raise AtomError(
            f"{title}: the Hub lists {shown(file.path)} of {file.size} bytes with the digest {shown(file.digest)}, "
            "which is no file of a dataset; check HF_ENDPOINT"
        )
