"""The lock file of a data recipe: for each source of the Hub its revision, and the size and digest of every file.

`atom pin` writes it from what the Hub states, so that plans need no network and keys are known before a byte is pulled.
A digest is that of git-lfs, `sha256:…`, or the id of a blob for a file that git holds itself, `git:…`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipeline.core import atomic_files
from pipeline.core.bounds import MOST_SOURCES, Line, SourceName, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped, shown
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import LOCK_BYTES, explain
from pipeline.hub.client import is_unsafe

DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
COMMIT = r"[0-9a-f]{40}"
HEADER = """\
# Written by `atom pin`: what the Hub states of each source of the data recipe. Lines of `files`: digest, bytes, path.
"""

Commit = Annotated[str, Words(40, "commit of 40 hex digits", COMMIT)]


@dataclass(frozen=True)
class LockedFile:
    """A file of a revision. path: in its repository; size: in bytes; digest: `sha256:…`, or `git:…` of a small file."""

    path: str
    size: int
    digest: str

    @property
    def hex(self) -> str:
        return self.digest.partition(":")[2]

    def digest_of(self, path: Path) -> str:
        """The digest of a local file, of the kind that this file has here."""
        if self.digest.startswith("sha256:"):
            return f"sha256:{sha256_file(path)}"
        with open(path, "rb") as file:
            sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            while chunk := file.read(1 << 20):
                sha1.update(chunk)
        return f"git:{sha1.hexdigest()}"


class LockedSource(Config):
    """A source of the Hub as it was pinned."""

    repo: Line = Field(description="dataset repository")
    requested: Line = Field(description="revision that the recipe requests")
    revision: Commit = Field(description="commit of that revision when it was pinned")
    pattern: Line = Field(description="pattern of the files")
    files: str = Field(description="a line for each file: its digest, its bytes and its path")

    def rows(self) -> list[LockedFile]:
        """The files, sorted by path. Raises ValueError naming a line that `atom pin` did not write."""
        return _rows(self.files)

    def require_rows(self, title: str) -> None:
        """Raises RecipeError if there is such a line."""
        try:
            self.rows()
        except ValueError as error:
            raise RecipeError(f"{title}: {error}") from None


@lru_cache(maxsize=MOST_SOURCES)
def _rows(text: str) -> list[LockedFile]:
    files = []
    for line in text.splitlines():
        digest, size, path = [*line.split(" ", 2), "", ""][:3]
        if not DIGEST.fullmatch(digest) or not re.fullmatch("[0-9]{1,16}", size) or is_unsafe(path):
            raise ValueError(f"{shown(line)} is no line of digest, bytes and path")
        files.append(LockedFile(path, int(size), digest))
    return sorted(files, key=lambda file: file.path)


class LockFile(Config):
    """The pinned sources of a data recipe, by their names."""

    sources: Annotated[dict[SourceName, LockedSource], Field(max_length=MOST_SOURCES)] = Field(
        description="pinned sources"
    )


def read(path: Path) -> Mapping[str, LockedSource]:
    """The pinned sources in a lock file, by name; none if there is no such file. Raises RecipeError if it is
    damaged."""
    try:
        entry = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _read_version(path, (entry.st_ino, entry.st_size, entry.st_mtime_ns))


@lru_cache(maxsize=8)
def _read_version(path: Path, version: tuple[int, int, int]) -> Mapping[str, LockedSource]:
    title = f"lock file {escaped(path.name, 80)}"
    try:
        raw = parse_yaml(read_file(path, title, LOCK_BYTES), title)
        try:
            sources = LockFile.model_validate(raw).sources
        except ValidationError as error:
            raise explain(error, LockFile, title, raw) from None
        for name, source in sources.items():
            source.require_rows(f"{title}: source {name}")
    except RecipeError as error:
        raise RecipeError(f"{error}; write it anew by `atom pin RECIPE`") from None
    return sources


def write(path: Path, sources: Mapping[str, LockedSource]) -> None:
    """Replaces a lock file. Raises RecipeError if its folder cannot be written."""
    text = [HEADER, "sources:\n"]
    for name, source in sorted(sources.items()):
        text.append(f"  {name}:\n")
        text += [
            f"    {field}: {json.dumps(value, ensure_ascii=False)}\n"
            for field, value in source.model_dump().items()
            if field != "files"
        ]
        text += ["    files: |\n", *(f"      {line}\n" for line in source.files.splitlines())]
    try:
        atomic_files.write(path, "".join(text))
    except OSError as error:
        raise RecipeError(
            f"{escaped(str(path), 200)} cannot be written ({error.strerror}); copy the data recipe to a folder of "
            "yours, and name it by its path"
        ) from None
