"""The licenses of a source's documents, counted with how each was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from stages.data.acquire.licenses.maps import UNMAPPED
from stages.data.acquire.readers.base import Unmapped

MOST_STRINGS = 1000
"""Different license strings that are counted in a part; there may be one for each document."""
SHOWN = 100
"""Those that `source.json` lists."""


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
        if string in self.unmapped or len(self.unmapped) < MOST_STRINGS:
            self.unmapped[string] += 1

    def facts(self) -> dict[str, Any]:
        """The counts as JSON: `licenses`, and `licenses_unmapped` of the most frequent strings. Empty for a source
        whose license is that of every document."""
        if all(basis == "" for _, basis in self.documents):
            return {}
        rows = [
            {"license": license, "found": basis, "documents": count, "bytes": self.bytes[license, basis]}
            for (license, basis), count in sorted(self.documents.items())
        ]
        strings = sorted(self.unmapped.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
        listed = [{"string": string, "documents": count} for string, count in strings]
        return {"licenses": rows} | ({"licenses_unmapped": listed} if listed else {})

    def part_facts(self) -> dict[str, Any]:
        """The counts as JSON, for `joined`."""
        counts = [[*key, count, self.bytes[key]] for key, count in sorted(self.documents.items())]
        return {"counts": counts, "unmapped": sorted(self.unmapped.items())}

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]]) -> LicenseTally:
        """The counts of all parts."""
        tally = cls()
        for part in parts:
            for license, basis, documents, size in part["counts"]:
                tally.documents[license, basis] += documents
                tally.bytes[license, basis] += size
            tally.unmapped.update(dict(part["unmapped"]))
        return tally
