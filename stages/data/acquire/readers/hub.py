"""Reader `hub`: files of a dataset repository of the Hugging Face Hub, at a pinned revision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pipeline.core.bounds import Line, LongLine, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import operational
from pipeline.core.store import home_folder
from pipeline.core.text import shown
from pipeline.hub.client import online
from pipeline.hub.limits import Slot
from stages.data.acquire import hub_files
from stages.data.acquire.hub_files import LockedFile, LockedSource
from stages.data.acquire.readers.base import Failed, Files
from stages.data.acquire.readers.row_files import Jsonl, Parquet, Row, RowReader

HOME = "$ATOM_HOME"
FORMATS: dict[str, type[RowReader]] = {"jsonl": Jsonl, "parquet": Parquet}

Repo = Annotated[
    str,
    Words(96, "dataset of the Hub, such as common-pile/news_filtered", r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"),
]

LockPath = Annotated[str, Words(4096, empty=True)]


class Hub(RowReader):
    """Files of a dataset repository of the Hugging Face Hub, in the format of another reader.

    `atom pin` writes their revision, sizes and digests beside the data recipe; each part pulls its own files.
    """

    remedy: ClassVar = "run `atom pin RECIPE`"

    reader: Literal["hub"]
    """selects this reader"""
    repo: Repo = operational(...)
    """dataset repository; the digests of its files are part of the key"""
    revision: Line = operational("main")
    """branch, tag or commit, which `atom pin` resolves to a commit"""
    pattern: Line = operational(...)
    """pattern of the paths of files in the repository; * matches / as well"""
    format: Literal["jsonl", "parquet"]
    """reader of the files"""
    path: LongLine = operational(f"{HOME}/hub")
    """folder that keeps pulled files; it may be removed at any time"""
    lock: LockPath = operational("")
    """lock file, NAME.lock.yaml beside the data recipe NAME.yaml; set when that is read"""

    def missing(self, source: str) -> str | None:
        return None if self.pinned(source) else f"source {source}: {self._unpinned(source)}"

    def files(self, source: str) -> Files:
        return [(file.path, self.place(file)) for file in self._rows(source)]

    def digests(self, source: str, files: Files) -> list[str]:
        """Returns the digests by the lock file, which `pull` compares: a SHA-256, or `git:` and the id of a blob."""
        digests = {file.path: file.digest.removeprefix("sha256:") for file in self._rows(source)}
        return [digests[name] for name, _ in files]

    def pull(self, source: str, files: Files) -> None:
        locked, rows = self.pinned(source), {file.path: file for file in self._rows(source)}
        assert locked is not None
        with Slot() as slot:
            for name, path in files:
                hub_files.pull(source, locked, rows[name], path, slot)

    def absolute(self, folder: Path) -> Hub:
        path = self.path.replace(HOME, str(home_folder()), 1) if self.path.startswith(HOME) else folder / self.path
        return self.model_copy(update={"path": str(Path(path).resolve())})

    def locked(self, lock: Path) -> Hub:
        if self.lock:
            raise RecipeError(f"reader hub of {self.repo}: lock = {shown(self.lock)} is no choice; leave it out")
        return self.model_copy(update={"lock": str(lock.absolute())})

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        settings = {name: getattr(self, name) for name in RowReader.model_fields}
        yield from FORMATS[self.format](**{**settings, "reader": self.format}).rows(files, columns)

    def rows_at_commit(self, name: str, columns: Sequence[str]) -> Iterator[Row]:
        """Yields the rows that `where` takes, of files at the commit `revision`, which needs no lock file.

        The files are pulled with the digests that the Hub states for that commit.

        Args:
            name: Name of the source, for messages.
            columns: Fields to read beside those of the settings.

        Raises:
            AtomError: A file cannot be pulled or read.
        """
        with online():
            locked = hub_files.resolve(name, self.repo, self.revision, self.pattern)
        files = [(file.path, self.place(file)) for file in locked.rows()]
        with Slot() as slot:
            for file, (_, path) in zip(locked.rows(), files, strict=True):
                hub_files.pull(name, locked, file, path, slot)
        names = [*columns, *self.where, *filter(None, [self.license_field])]
        rows = self.rows(files, list(dict.fromkeys(names)))
        return (row for row in rows if isinstance(row, Row) and self.reads(row))

    def pinned(self, source: str) -> LockedSource | None:
        """Returns the source as it is pinned; None if it is not, or if these settings have changed since."""
        entry = hub_files.read(Path(self.lock)).get(source) if self.lock else None
        settings = self.repo, self.pattern
        if (
            entry is None
            or settings != (entry.repo, entry.pattern)
            or self.revision not in (entry.requested, entry.revision)
        ):
            return None
        return entry

    def _unpinned(self, source: str) -> str:
        lock = Path(self.lock) if self.lock else None
        has_entry = lock is not None and source in hub_files.read(lock)
        place = f" in {lock.name}" if lock else ""
        if has_entry:
            return f"{self.repo} is pinned{place} with another repository, revision or pattern"
        return f"{self.repo} is not pinned{place}"

    def _rows(self, source: str) -> list[LockedFile]:
        """Returns the pinned files. Raises RecipeError without any."""
        entry = self.pinned(source)
        if entry is None:
            raise RecipeError(f"{self.missing(source)}; {self.remedy}")
        return entry.rows()

    def place(self, file: LockedFile) -> Path:
        """Returns the place of a pulled file.

        It is below the digest, so that an unchanged file of another revision is not pulled again.
        """
        return Path(self.path, self.repo, file.hex, file.path.rsplit("/", 1)[-1])
