"""The disposition of every input document: kept, or removed by one rule. See docs/formats.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import AtomError
from stages.data.table import DispositionRow, DocumentRow


@dataclass(slots=True)
class Disposition:
    """One row of dispositions.parquet."""

    id: str
    source: str
    license: str
    content_hash: str
    bytes: int
    disposition: str = ""
    split: str | None = None
    rule: str | None = None
    value: float | None = None
    threshold: float | None = None
    duplicate_of: str | None = None
    match: str | None = None
    kept_hash: str | None = None


class Dispositions:
    """Every input document gets exactly one disposition, or `close` raises."""

    def __init__(self) -> None:
        self.rows: dict[str, Disposition] = {}

    @classmethod
    def from_rows(cls, rows: Iterable[DispositionRow]) -> Dispositions:
        """The dispositions of an earlier stage, with its kept documents undecided again."""
        dispositions = cls()
        for row in rows:
            dispositions.rows[row["id"]] = disposition = Disposition(**row)
            if disposition.disposition == "kept":
                disposition.disposition, disposition.kept_hash = "", None
        return dispositions

    def add(self, row: DocumentRow) -> None:
        """Adds an acquired document. Raises AtomError for a duplicate id, or a document without a license."""
        if row["id"] in self.rows:
            raise AtomError(f"two input documents have the id {row['id']}; ids must differ over all sources")
        if not row["license"]:
            raise AtomError(f"document {row['id']} has no license; acquire its source with a license")
        size = len(row["text"].encode())
        self.rows[row["id"]] = Disposition(row["id"], row["source"], row["license"], row["content_hash"], size)

    def remove(
        self,
        id: str,
        rule: str,
        value: float,
        threshold: float,
        duplicate_of: str | None = None,
        match: str | None = None,
    ) -> None:
        row = self._require_undecided(id)
        row.disposition, row.rule, row.value, row.threshold = "removed", rule, float(value), float(threshold)
        row.duplicate_of, row.match = duplicate_of, match

    def keep(self, id: str, split: str | None, kept_hash: str) -> None:
        row = self._require_undecided(id)
        row.disposition, row.split, row.kept_hash = "kept", split, kept_hash

    def _require_undecided(self, id: str) -> Disposition:
        if id not in self.rows:
            raise AtomError(f"curation produced the document {id}, which no source holds")
        if self.rows[id].disposition:
            raise AtomError(f"curation decided twice about {id}: {self.rows[id].rule or 'kept'}, and again")
        return self.rows[id]

    def close(self, kept: dict[str, int]) -> Iterator[dict[str, Any]]:
        """All rows in the order of input. `kept` is the number of documents written, by source.

        Raises AtomError if a document has no disposition or the counts of a source do not balance.
        """
        counts: dict[str, Counter[str]] = {}
        for row in self.rows.values():
            counts.setdefault(row.source, Counter())[row.disposition] += 1
        for source, count in counts.items():
            if count[""] or kept.get(source, 0) != count["kept"]:
                raise AtomError(
                    f"source {source} does not balance: {count.total()} in, {count['kept']} kept "
                    f"({kept.get(source, 0)} written), {count['removed']} removed, {count['']} without a disposition; "
                    f"this is a fault of curation"
                )
        return map(asdict, self.rows.values())

    def summary(self, edits: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Documents and bytes, in, kept by split, and removed by rule; by source and in total."""

        def counts(rows: list[Disposition]) -> dict[str, Any]:
            removed = [row for row in rows if row.disposition == "removed"]
            return {
                "documents_in": len(rows),
                "bytes_in": sum(row.bytes for row in rows),
                "kept": Counter(row.split for row in rows if row.disposition == "kept"),
                "removed": Counter(row.rule for row in removed),
                "removed_bytes": sum(row.bytes for row in removed),
            }

        sources: dict[str, list[Disposition]] = {}
        for row in self.rows.values():
            sources.setdefault(row.source, []).append(row)
        by_source = {name: {**counts(rows), "edited": edits.get(name, {})} for name, rows in sorted(sources.items())}
        return {"sources": by_source, "total": counts(list(self.rows.values()))}
