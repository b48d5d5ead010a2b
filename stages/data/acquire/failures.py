"""Documents that are not used: failed ones, refused ones, and the licenses that no map knows.

A failed document cannot be read or curated: it is counted, the first ones by name, and many of them are an error. A
refused document is in order, but its author or its license does not allow the use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

from pipeline.core.errors import AtomError
from pipeline.core.stage import Report
from stages.data.acquire.licenses.maps import UNKNOWN_WEB, UNMAPPED
from stages.data.acquire.readers.base import REFUSED_RULES, Refused, Unmapped
from stages.formats.table import FailedRow

# The rule of their dispositions.
FAILED_RULE = "failed/parse"
MOST = 10
# More failures than MOST, and than MOST_SHARE of the documents of a part, stop the stage.
MOST_SHARE = 0.01
# The failures that a sentence names.
SHOWN = 3
# {kind of refusal: its name in the counts of `source.json`}.
COUNTS = {
    "license": "documents_unmapped",
    "opt_out": "documents_opted_out",
    "page": "documents_unusable",
    "derivatives": "documents_no_derivatives",
    "generation": "documents_not_generated",
}
# Different license strings that are counted in a part; there may be one for each document.
MOST_STRINGS = 1000
# License strings that `source.json` lists, the most frequent ones.
LISTED = 100


class FailureFacts(TypedDict):
    """The number of failures, and the (id, reason) of the first ones."""

    count: int
    first: list[tuple[str, str]]


class Failures:
    """The failed documents of a part, or of the parts of a source."""

    def __init__(self, subject: str = "", problem: str = "", most_share: float = MOST_SHARE, kept: int = SHOWN) -> None:
        """Begins without failures.

        Args:
            subject: The beginning of the sentence if there are too many: `subject: 11 of 100 documents`.
            problem: The rest of that sentence.
            most_share: The largest share of failures that is no error.
            kept: The number of failures whose names are kept.
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
            # Reasons can quote a document; a line of the log must stay one line.
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
        """Returns the failures of all parts."""
        failures = cls(kept=kept)
        for facts in parts:
            failures.count += facts["count"]
            failures.first += [(id, reason) for id, reason in facts["first"][: kept - len(failures.first)]]
        return failures


def _name(id: str, reason: str) -> str:
    return f"{id} ({reason})" if reason else id


def kind_of(document: Unmapped | Refused) -> str:
    return "license" if isinstance(document, Unmapped) else document.kind


def refused_row(source: str, id: str, document: Unmapped | Refused) -> FailedRow:
    """Returns the row of `failed`. Its license is not that of the source, which covers the documents that are used."""
    if isinstance(document, Refused):
        license, reason = document.license or UNKNOWN_WEB, document.reason
    else:
        stated = document.license.encode(errors="replace").decode()[:500]
        license, reason = UNMAPPED, f"no map knows {stated!r}" if stated else "the document states none"
    return {"id": id, "source": source, "license": license, "reason": f"{kind_of(document)}: {reason}"}


def report_refusals(source: str, refusals: Counter[str], licenses: dict[str, Any], report: Report) -> None:
    """Notes the counts of refusals, and the most frequent license strings that no map knows."""
    for kind, count in sorted(refusals.items()):
        report.note(f"source {source}: {count} documents will be removed by curation: {REFUSED_RULES[kind]}")
    for row in licenses.get("licenses_unmapped", [])[:5]:
        stated = f"the license {row['string']!r}, which no map knows" if row["string"] else "no license"
        report.note(f"source {source}: {row['documents']} documents state {stated}")


class LicenseTally:
    """Counts of documents and bytes by license and how it was found, and of the strings that have no license."""

    def __init__(self) -> None:
        self.documents = Counter[tuple[str, str]]()
        self.bytes = Counter[tuple[str, str]]()
        self.unmapped = Counter[str]()

    def add(self, license: str, basis: str, size: int) -> None:
        self.documents[license, basis] += 1
        self.bytes[license, basis] += size

    def add_unmapped(self, document: Unmapped) -> None:
        self.add(UNMAPPED, document.license_found if document.license else "none", len(document.text.encode()))
        string = " ".join(document.license.split())[:200]
        # A free text as a license could differ in every document; memory must not grow with them.
        if string in self.unmapped or len(self.unmapped) < MOST_STRINGS:
            self.unmapped[string] += 1

    def facts(self) -> dict[str, Any]:
        """Returns the counts as JSON: `licenses`, and `licenses_unmapped` of the most frequent strings.

        Empty for a source whose license is that of every document.
        """
        # An empty basis means that the declaration of the source is the license.
        if all(basis == "" for _, basis in self.documents):
            return {}
        rows = [
            {"license": license, "found": basis, "documents": count, "bytes": self.bytes[license, basis]}
            for (license, basis), count in sorted(self.documents.items())
        ]
        strings = sorted(self.unmapped.items(), key=lambda item: (-item[1], item[0]))[:LISTED]
        listed = [{"string": string, "documents": count} for string, count in strings]
        return {"licenses": rows} | ({"licenses_unmapped": listed} if listed else {})

    def part_facts(self) -> dict[str, Any]:
        """Returns the counts as JSON, for `joined`."""
        counts = [[*key, count, self.bytes[key]] for key, count in sorted(self.documents.items())]
        return {"counts": counts, "unmapped": sorted(self.unmapped.items())}

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]]) -> LicenseTally:
        """Returns the counts of all parts."""
        tally = cls()
        for part in parts:
            for license, basis, documents, size in part["counts"]:
                tally.documents[license, basis] += documents
                tally.bytes[license, basis] += size
            tally.unmapped.update(dict(part["unmapped"]))
        return tally
