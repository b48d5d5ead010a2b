"""Documents that cannot be read or curated: counted, the first ones by name, and refused where they are many."""

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
"""The failures that a sentence names."""


class FailureFacts(TypedDict):
    """The number of failures, and the (id, reason) of the first ones."""

    count: int
    first: list[tuple[str, str]]


class Failures:
    """The failed documents of a part, or of the parts of a source."""

    def __init__(self, subject: str = "", problem: str = "", most_share: float = MOST_SHARE, kept: int = SHOWN) -> None:
        """The sentence if there are too many continues after `subject: 11 of 100 documents`.

        most_share: in place of MOST_SHARE; kept: the number of failures whose names are kept.
        """
        self.subject, self.problem, self.most_share, self.kept = subject, problem, most_share, kept
        self.count = 0
        self.first: list[tuple[str, str]] = []

    def __str__(self) -> str:
        names = ", ".join(_name(*failure) for failure in self.first[:SHOWN])
        total = f", … ({self.count} in all)" if self.count > SHOWN else ""
        return f"{'document' if self.count == 1 else 'documents'} {names}{total}"

    def add(self, id: str, reason: str = "") -> None:
        self.count += 1
        if len(self.first) < self.kept:
            self.first.append((id, " ".join(reason.split())[:200]))

    def require_few(self, documents: int) -> None:
        """Raises AtomError if so many of the documents of a part failed that the settings must be wrong."""
        if self.count > MOST and self.count > self.most_share * documents:
            raise AtomError(
                f"{self.subject}: {self.count} of {documents} documents {self.problem}; the first is "
                f"{_name(*self.first[0])}"
            )

    def facts(self) -> FailureFacts:
        return {"count": self.count, "first": self.first}

    @classmethod
    def joined(cls, parts: Iterable[FailureFacts], kept: int = SHOWN) -> Failures:
        """The failures of all parts."""
        failures = cls(kept=kept)
        for facts in parts:
            failures.count += facts["count"]
            failures.first += [(id, reason) for id, reason in facts["first"][: kept - len(failures.first)]]
        return failures


def _name(id: str, reason: str) -> str:
    return f"{id} ({reason})" if reason else id
