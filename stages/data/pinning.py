"""Pins the sources of the Hub in a data recipe: their revisions, and the sizes and digests of their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import RecipeError
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import find, lock_of
from stages.data.acquire import hub_files
from stages.data.acquire.hub_files import LockedSource
from stages.data.acquire.readers.hub import Hub
from stages.data.recipe import load


@dataclass(frozen=True)
class Pin:
    """A source as it is pinned now.

    Attributes:
        name: Name of the source.
        entry: Its entry in the lock file.
        previous: The commit to which it was pinned; None if to none, or with other settings.
    """

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
    """Returns the data recipe of a name or path, which may be that of a recipe that names it. Raises RecipeError."""
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
    # The lock file is written at the end: an error leaves the earlier one as it was.
    lock, entries = lock_of(path), dict[str, LockedSource]()
    known = _known(lock)
    for name, reader in readers.items():
        entries[name] = hub_files.resolve(name, reader.repo, reader.revision, reader.pattern)
        earlier = known.get(name)
        yield Pin(name, entries[name], earlier.revision if earlier and earlier.repo == reader.repo else None)
    hub_files.write(lock, entries)


def _known(lock: Path) -> Mapping[str, LockedSource]:
    """Returns the sources in a lock file; none if it is damaged, as it is written anew."""
    try:
        return hub_files.read(lock)
    except RecipeError:
        return {}
