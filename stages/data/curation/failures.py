"""Documents that cannot be read or curated: removed and reported one by one while they are few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from pipeline.core.errors import AtomError

FAILED_RULE = "failed/parse"
"""The rule of their dispositions."""
MOST = 10
MOST_SHARE = 0.01
"""More failures than MOST, and than MOST_SHARE of the documents of a part, stop the stage."""
SHOWN = 3


class FailureFacts(TypedDict):
    """The number of failures, and the (id, reason) of the first ones."""

    count: int
    first: list[tuple[str, str]]


class Failures:
    """The failed documents of a part, or of the parts of a source."""

    def __init__(self, subject: str = "", problem: str = "") -> None:
        """The sentence if there are too many continues after `subject: 11 of 100 documents`."""
        self.subject, self.problem = subject, problem
        self.count = 0
        self.first: list[tuple[str, str]] = []

    def __str__(self) -> str:
        names = ", ".join(f"{id} ({reason})" for id, reason in self.first)
        total = f", … ({self.count} in all)" if self.count > len(self.first) else ""
        return f"{'document' if self.count == 1 else 'documents'} {names}{total}"

    def add(self, id: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((id, " ".join(reason.split())[:200]))

    def require_few(self, documents: int) -> None:
        """Raises AtomError if so many of the documents of a part failed that the settings must be wrong."""
        if self.count > MOST and self.count > MOST_SHARE * documents:
            id, reason = self.first[0]
            raise AtomError(
                f"{self.subject}: {self.count} of {documents} documents {self.problem}; the first is {id} ({reason})"
            )

    def facts(self) -> FailureFacts:
        return {"count": self.count, "first": self.first}

    @classmethod
    def joined(cls, parts: Iterable[FailureFacts]) -> Failures:
        """The failures of all parts."""
        failures = cls()
        for facts in parts:
            failures.count += facts["count"]
            failures.first += [(id, reason) for id, reason in facts["first"]]
        failures.first = failures.first[:SHOWN]
        return failures
