"""A list that curation takes from a file of lines, of which the digest is part of the key of filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import sha256_bytes

MOST_LINE_BYTES = 20_000
Line = tuple[str, bytes]
"""(place for messages, line)."""
List = TypeVar("List")


class ListFile(Generic[List]):
    """title: for messages; setting: of curation, which names the file; parse: makes the list of its lines, and raises
    RecipeError for the first one that is no entry."""

    def __init__(self, title: str, setting: str, parse: Callable[[Iterable[Line]], List]) -> None:
        self.title, self.setting, self.parse = title, setting, parse

    def lines(self, path: Path) -> Iterator[Line]:
        """The lines that are not empty. Raises RecipeError if the file cannot be read, or for a line that is too
        long."""
        return self._lines(path, self._read_bytes(path))

    def digest_of(self, path: Path) -> str:
        """The digest of a file, `sha256:…`, whose lines were all read. Raises RecipeError."""
        content = self._read_bytes(path)
        self.parse(self._lines(path, content))
        return f"sha256:{sha256_bytes(content)}"

    def read(self, path: Path, sha256: str) -> List:
        """The list of a file. Raises RecipeError if it cannot be read, or is not the one in the key."""
        content = self._read_bytes(path)
        if sha256 != f"sha256:{sha256_bytes(content)}":
            raise RecipeError(f"{self.title} {path} changed after the run was planned; plan and run again")
        return self.parse(self._lines(path, content))

    def require(self, path: str | None, sha256: str | None) -> List | None:
        """The list of a config of filter, or None without one. Raises RecipeError, and AtomError for a config whose
        digest is not resolved."""
        if path is None:
            return None
        if sha256 is None:
            raise AtomError(f"{self.title} {path} has no digest; run through the recipe's resolved() form")
        return self.read(Path(path), sha256)

    def _read_bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(f"{self.title} {path} cannot be read ({reason}); check curation.{self.setting}") from None

    def _lines(self, path: Path, content: bytes) -> Iterator[Line]:
        for number, line in enumerate(content.split(b"\n"), 1):
            place = f"{self.title} {path}, line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise RecipeError(f"{place}: has {len(line)} bytes; an entry has at most {MOST_LINE_BYTES}")
            if line.strip():
                yield place, line
