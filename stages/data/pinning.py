"""Pins the sources of the Hub in a data recipe: their revisions, and the sizes and digests of their files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.text import escaped, shown
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import find, lock_of
from pipeline.hub.client import translate_errors
from pipeline.hub.remote import RemoteRepository, is_unsafe
from stages.data import lock_file
from stages.data.lock_file import COMMIT, DIGEST, LockedFile, LockedSource
from stages.data.readers.base import MAX_ENTRIES
from stages.data.readers.hub import Hub
from stages.data.recipe import load

MOST_BYTES = 10**15


@dataclass(frozen=True)
class Pin:
    """A source as it is pinned now. previous: the commit to which it was pinned; None if to none, or with other
    settings."""

    name: str
    entry: LockedSource
    previous: str | None

    def __str__(self) -> str:
        files = self.entry.rows()
        size = sum(file.size for file in files) / 1e9
        moved = self.previous not in (None, self.entry.revision)
        change = f", previously {str(self.previous)[:12]}" if moved else ""
        commit = self.entry.revision[:12]
        return f"{self.name}: {self.entry.repo}@{commit}{change}, {len(files)} files, {size:.3f} GB"

    def json(self) -> dict[str, Any]:
        files = self.entry.rows()
        return {
            "name": self.name,
            "repo": self.entry.repo,
            "revision": self.entry.revision,
            "previous": self.previous,
            "files": len(files),
            "bytes": sum(file.size for file in files),
        }


def data_recipe(reference: str) -> Path:
    """The data recipe of a name or path, which may be that of a recipe that names it. Raises RecipeError."""
    try:
        path = find(reference, "pipeline.recipes", "recipe")
    except RecipeError as error:
        try:
            return find(reference, "data_recipes", "data recipe")
        except RecipeError:
            raise error from None
    title = f"recipe {escaped(path.stem, 80)}"
    data = parse_yaml(read_file(path, title), title).get("data")
    return path if data is None else find(str(data), "data_recipes", "data recipe", path.parent)


def pin(path: Path) -> Iterator[Pin]:
    """Asks the Hub for each of its sources in a data recipe, and writes the lock file at the end.

    Raises AtomError, with the lock file as it was, if the Hub does not have one of them, or does not answer.
    """
    readers = {source.name: source.reader for source in load(path).sources if isinstance(source.reader, Hub)}
    if not readers:
        raise RecipeError(
            f"data recipe {escaped(path.stem, 80)} has no source with the reader hub; there is nothing to pin"
        )
    lock, entries = lock_of(path), dict[str, LockedSource]()
    known = _known(lock)
    for name, reader in readers.items():
        entries[name] = _resolve(name, reader)
        earlier = known.get(name)
        yield Pin(name, entries[name], earlier.revision if earlier and earlier.repo == reader.repo else None)
    lock_file.write(lock, entries)


def _known(lock: Path) -> Mapping[str, LockedSource]:
    """The sources in a lock file; none if it is damaged, as it is written anew."""
    try:
        return lock_file.read(lock)
    except RecipeError:
        return {}


def _resolve(name: str, reader: Hub) -> LockedSource:
    """What the Hub states of a source. Raises AtomError."""
    remote, title = RemoteRepository(reader.repo, "dataset"), f"source {name}: {reader.repo}@{reader.revision}"
    with translate_errors(f"pinning {title}"):
        commit = remote.commit(reader.revision)
        entries = remote.files(commit)
    if not re.fullmatch(COMMIT, commit) or (re.fullmatch(COMMIT, reader.revision) and commit != reader.revision):
        raise AtomError(
            f"{title}: the Hub answers with the commit {shown(commit)}, which is another; check HF_ENDPOINT"
        )
    files = []
    for path, entry in sorted(entries.items()):
        if fnmatchcase(path, reader.pattern):
            files.append(LockedFile(path, entry.size, f"{'git' if len(entry.id) == 40 else 'sha256'}:{entry.id}"))
            _require_valid(title, files[-1])
    if not files:
        raise RecipeError(
            f"{title} has no file that matches {reader.pattern!r} among {len(entries)}; set reader.pattern"
        )
    if len(files) > MAX_ENTRIES:
        raise RecipeError(f"{title}: more than {MAX_ENTRIES} files match {reader.pattern!r}; set reader.pattern")
    lines = "".join(f"{file.digest} {file.size} {file.path}\n" for file in files)
    return LockedSource(
        repo=reader.repo, requested=reader.revision, revision=commit, pattern=reader.pattern, files=lines
    )


def _require_valid(title: str, file: LockedFile) -> None:
    """Raises AtomError for a file that no Hub has."""
    if is_unsafe(file.path) or not DIGEST.fullmatch(file.digest) or not 0 <= file.size <= MOST_BYTES:
        raise AtomError(
            f"{title}: the Hub lists {shown(file.path)} of {file.size} bytes with the digest {shown(file.digest)}, "
            "which is no file of a dataset; check HF_ENDPOINT"
        )
