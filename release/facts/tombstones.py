"""The tombstone of a retraction: `retracted.json` in each repository that was rewritten.

It states which documents went, for which requests (by the SHA-256 of their references), which files changed, and the
checksums of the repositories before, by which an old copy is recognized. The checksums and the signature of its
repository cover it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import CheckFailed
from release import untrusted
from release.layout import RETRACTED

SCHEMA = 1
"""The version of the form of the file."""
TOMBSTONE_BYTES = 16 << 20
"""The maximum bytes that are read of the file."""
MOST_LISTED = 10_000
"""The maximum number of documents that a tombstone names."""


@dataclass(frozen=True)
class ChangedFile:
    """A file of a release that was rewritten.

    Attributes:
        path: Its path in the release folder.
        before: Its SHA-256 before; empty if it is new.
        after: Its SHA-256 after; null if it was removed.
    """

    path: str
    before: str
    after: str | None


@dataclass(frozen=True)
class ChangedRepository:
    """A branch of a repository that was rewritten.

    Attributes:
        repository: Its id on the Hub.
        branch: The branch.
        folder: Its place in the release.
        checksums: The SHA-256 of its `SHA256SUMS` before the retraction.
        files: The files that changed.
    """

    repository: str
    branch: str
    folder: str
    checksums: str
    files: tuple[ChangedFile, ...]


@dataclass(frozen=True)
class RetractedDocument:
    """A document that was taken back.

    Attributes:
        id: Its id.
        found: How it was found, as in an opt-out.
        requests: The SHA-256 of the reference of each request that reached it.
    """

    id: str
    found: str
    requests: tuple[str, ...]


@dataclass(frozen=True)
class Tombstone:
    """A retraction.

    Attributes:
        release: The name and the version of the release.
        dates: Day of each request, by the SHA-256 of its reference.
        count: The number of documents.
        documents: The first 10,000 of them.
        repositories: The branches that were rewritten.
        trained: Repositories, and branches of checkpoints, that were trained on a document.
        removed: Those of them that were retracted as well.
    """

    release: str
    dates: dict[str, str]
    count: int
    documents: tuple[RetractedDocument, ...]
    repositories: tuple[ChangedRepository, ...]
    trained: tuple[str, ...]
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sentence(self) -> str:
        return f"{self.count} {'document' if self.count == 1 else 'documents'} of {self.release} taken back on request"


_TOMBSTONES: TypeAdapter[list[Tombstone]] = TypeAdapter(list[Tombstone])


def read_tombstones(folder: Path) -> list[Tombstone]:
    """Returns the retractions of a repository or release, the first one first; none without a tombstone file.

    Raises CheckFailed if it cannot be read.
    """
    if not (folder / RETRACTED).exists():
        return []
    body = untrusted.read_json(folder / RETRACTED, TOMBSTONE_BYTES, follow=True)
    try:
        if body["schema"] != SCHEMA:
            raise CheckFailed(
                f"{RETRACTED} has schema {body['schema']}, and this atom knows {SCHEMA}; use a later atom"
            )
        return _TOMBSTONES.validate_python(body["retractions"])
    except (KeyError, TypeError, ValidationError):
        raise CheckFailed(f"{RETRACTED} is no tombstone of a retraction") from None


def tombstones_json(tombstones: list[Tombstone]) -> dict[str, Any]:
    return {"schema": SCHEMA, "retractions": [tombstone.to_json() for tombstone in tombstones]}
