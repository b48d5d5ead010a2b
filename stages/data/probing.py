"""What a sample of a source says of the source: its reader and its steps run on the pieces of the sample.

Time and memory grow with the sample, of which the content hashes of the kept documents stay in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from stages.confidence import Z95, root_of_squares, wilson, work_deviations
from stages.data.acquire.acquire_stage import document_row
from stages.data.acquire.hub_samples import Piece, Sample
from stages.data.acquire.readers.base import FAILED_RULE, REFUSED_RULES, Document, Failed, Failures, Unreadable, kind_of
from stages.data.acquire.readers.row_files import Row, RowReader, field_at, in_words
from stages.data.acquire.source_probe import LISTED, LONG, LicenseString, Probe, RuleShare
from stages.data.curate.alarms import MIN_DOCUMENTS, filter_losses
from stages.data.curate.decontamination import ContaminationIndex
from stages.data.curate.filters.own import most_probable
from stages.data.curate.source_filter import SECRETS, Removed, SourceFilter
from stages.data.recipe import SourceConfig

DUPLICATE = "exact_duplicate"
# Strings of a license field that are compared between files; a free text could differ in every row.
MOST_STRINGS = 1000


@dataclass
class _PieceCounts:
    """The counts of a piece: rows, documents, bytes of text, bytes that are kept, and removed documents by rule."""

    piece: Piece
    rows: int = 0
    documents: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    # {(string, SPDX expression or an empty text): rows}
    licenses: Counter[tuple[str, str]] = field(default_factory=Counter)

    def of_file(self, value: float) -> float:
        """Returns a sum over the rows of the piece, scaled to all rows that it stands for."""
        return value / self.rows * self.piece.rows if self.rows else 0.0


class Measurement:
    """A source, measured by the pieces of its sample.

    Attributes:
        hashes: Content hashes of the kept documents.
        problems: Sentences on what is wrong with the source.
    """

    def __init__(self, source: SourceConfig, sample: Sample, total_bytes: int, alarm_share: float) -> None:
        """Runs the reader and the steps of a source.

        Args:
            source: The source.
            sample: Its sample.
            total_bytes: Bytes of all of its files.
            alarm_share: The share of a source above which the removals of a rule must be acknowledged.
        """
        self.source, self.sample, self.total_bytes = source, sample, total_bytes
        self.hashes, self.problems = set[str](), list(sample.problems)
        self.counts: list[_PieceCounts] = []
        self.languages, self.long = Counter[str](), Counter[int]()
        self.failures = Failures(f"source {source.name}", "cannot be read; check the settings of its reader")
        try:
            steps = SourceFilter(
                source.name, source.kind, source.steps, ContaminationIndex((), 1), source.license_allow
            )
        except AtomError as error:
            self.problems.append(f"source {source.name}: {error}")
            return
        for piece in sample.pieces:
            try:
                self._read(piece, steps)
            except AtomError as error:
                self.problems.append(f"source {source.name}: {error}")
        self._judge_failures(steps)
        self._judge_licenses()
        # What is removed for a reason above needs no second sentence.
        if not self.problems:
            self._judge_removals(alarm_share)

    def _read(self, piece: Piece, steps: SourceFilter) -> None:
        source, counts = self.source, _PieceCounts(piece)
        reader, files = source.reader, [(piece.file, piece.path)]
        assert isinstance(reader, RowReader)
        licenses = reader.licenses
        for row in reader.rows(files):
            counts.rows += 1
            if reader.license_field and isinstance(row, Row) and len(counts.licenses) < MOST_STRINGS:
                stated = field_at(row.fields, reader.license_field)
                counts.licenses[escaped(in_words(stated), 200), licenses.expression(stated) or ""] += 1
        for document in reader.documents(source.name, 0, files):
            if isinstance(document, Unreadable):
                continue
            counts.documents += 1
            if isinstance(document, Document):
                self._curate(document, counts, steps)
            elif isinstance(document, Failed):
                counts.removed[FAILED_RULE] += 1
                self.failures.add(document.name, document.reason)
            else:
                counts.removed[REFUSED_RULES[kind_of(document)]] += 1
                counts.bytes += len(getattr(document, "text", "").encode(errors="replace"))
        self.counts.append(counts)

    def _curate(self, document: Document, counts: _PieceCounts, steps: SourceFilter) -> None:
        """Counts a document as removed by the first rule that does so, or as kept."""
        size = len(document.text.encode())
        counts.bytes += size
        if self.source.kind != "code":
            self.languages[most_probable(document.text)] += size
        result = steps.apply(document_row(self.source, f"{self.source.name}/{document.name}", document))
        if isinstance(result, Removed):
            counts.removed[result.rule] += 1
        elif result["content_hash"] in self.hashes:
            counts.removed[DUPLICATE] += 1
        else:
            self.hashes.add(result["content_hash"])
            kept = len(result["text"].encode())
            counts.kept_bytes += kept
            self.long.update({n: kept for n in LONG if kept > n * self.source.bytes_per_token})

    def _judge_failures(self, steps: SourceFilter) -> None:
        """Adds the sentences with which acquire or filter would stop, as too many documents fail."""
        documents = sum(counts.documents for counts in self.counts)
        for failures in (self.failures, steps.failures):
            try:
                failures.require_few(documents)
            except AtomError as error:
                self.problems.append(str(error))

    def _judge_licenses(self) -> None:
        """Adds a sentence if no row states a license, or if none that a file states is known."""
        name, reader = self.source.name, self.source.reader
        assert isinstance(reader, RowReader)
        stated = {each.piece.path: [key for key in each.licenses if key[0]] for each in self.counts}
        if reader.license_field is None or not self.counts:
            return
        if not any(stated.values()):
            fields = ", ".join(list(self.sample.fields)[:LISTED])
            self.problems.append(
                f"source {name}: no sampled row states a license in {reader.license_field} (fields: {fields}); set "
                "reader.license_field"
            )
            return
        # A piece whose strings are all unknown is spelled in another way; of few rows, it may be chance.
        unknown = [
            each
            for each in self.counts
            if each.rows >= MIN_DOCUMENTS and each.licenses and not any(license for _, license in each.licenses)
        ]
        if unknown and (strings := stated[unknown[0].piece.path]):
            others = "nor is any other" if len(unknown) == len(stated) else "those of other files are"
            self.problems.append(
                f"source {name}: no license string of {escaped(unknown[0].piece.file, 200)} is known, such as "
                f"{strings[0][0]!r}, and {others}; add them to reader.license_strings"
            )

    def _judge_removals(self, alarm_share: float) -> None:
        """Adds a sentence for each rule at whose removals filter would stop."""
        removed = sum((each.removed for each in self.counts), Counter[str]())
        del removed[DUPLICATE]
        steps, acknowledged = [step.name for step in self.source.steps], self.source.acknowledged_removals
        documents = sum(each.documents for each in self.counts)
        for loss in filter_losses(self.source.name, steps, documents, removed):
            limit = max(alarm_share, acknowledged.get(loss.rule, 0.0))
            if loss.documents >= MIN_DOCUMENTS and loss.share > limit:
                self.problems.append(
                    f"source {loss} of the sample, a larger share than {limit:g}, at which filter would stop; change "
                    "the rule, or acknowledge it in acknowledged_removals"
                )

    def probe(self, settings: str, sampled: str) -> Probe:
        """Returns the entry of the lock file."""
        counts = self.counts
        documents, sampled_bytes = (sum(getattr(each, name) for each in counts) for name in ("documents", "bytes"))
        kept, half = self._total([each.of_file(each.kept_bytes) for each in counts])
        kept_in_sample = sum(each.kept_bytes for each in counts)
        removed = sum((each.removed for each in counts), Counter[str]())
        licenses = sum((each.licenses for each in counts), Counter[tuple[str, str]]())
        return Probe(
            settings=settings,
            sampled="row groups" if sampled == "parquet" else "heads",
            pieces=len(counts),
            problem=escaped("; ".join(self.problems[:3]), 1000),
            sampled_documents=documents,
            sampled_bytes=sampled_bytes,
            kept_documents=len(self.hashes),
            documents=round(self._total([each.of_file(each.documents) for each in counts])[0]),
            bytes=round(self._total([each.of_file(each.bytes) for each in counts])[0]),
            kept_bytes=round(kept),
            kept_low=None if half is None else max(0, round(kept - half)),
            kept_high=None if half is None else round(kept + half),
            bytes_per_token=self.source.bytes_per_token,
            kept_tokens=round(kept / self.source.bytes_per_token),
            secrets=sum(count for rule, count in removed.items() if rule.startswith(f"{SECRETS}/")),
            duplicates=removed[DUPLICATE],
            fields={name: "|".join(sorted(kinds)) for name, kinds in sorted(self.sample.fields.items())},
            licenses=tuple(
                LicenseString(string=string, license=license, share=round(count / licenses.total(), 6))
                for (string, license), count in _frequent(licenses)
            ),
            languages=_shares(self.languages, sum(self.languages.values())),
            removed={rule: self._rule_share(rule, count, documents) for rule, count in _frequent(removed)},
            long_documents=_shares(self.long, kept_in_sample),
        )

    def _total(self, values: Sequence[float]) -> tuple[float, float | None]:
        """Returns the estimate of a sum over the source, and half of its interval.

        The sum of the pieces by the bytes that they stand for is a ratio of sums (Cochran, Sampling Techniques, §6.3).
        A sample of all files has no error. Half is None for a single piece of a larger source.

        Args:
            values: The sum over what each piece stands for.
        """
        sizes = [each.piece.bytes for each in self.counts]
        if not sum(sizes):
            return 0.0, 0.0
        estimate = sum(values) / sum(sizes) * self.total_bytes
        read = sum(
            size * each.rows / each.piece.rows for size, each in zip(sizes, self.counts, strict=True) if each.rows
        )
        unread = max(0.0, 1 - read / self.total_bytes)
        if unread < 1e-6:
            return estimate, 0.0
        if len(values) < 2:
            return estimate, None
        deviations = work_deviations([(v, max(1, round(size))) for v, size in zip(values, sizes, strict=True)]).values()
        return estimate, Z95 * root_of_squares(deviations) / sum(sizes) * self.total_bytes * math.sqrt(unread)

    def _rule_share(self, rule: str, count: int, documents: int) -> RuleShare:
        """Returns a count with the wider of its intervals by documents (Wilson) and by pieces."""
        low, high = wilson(count, documents)
        pairs = [(each.removed[rule], each.documents) for each in self.counts if each.documents]
        if len(pairs) > 1:
            half = Z95 * root_of_squares(work_deviations(pairs).values()) / documents
            low, high = min(low, max(0.0, count / documents - half)), max(high, min(1.0, count / documents + half))
        return RuleShare(documents=count, low=round(low, 6), high=round(high, 6))


def _frequent(counts: Counter[Any]) -> list[tuple[Any, int]]:
    """Returns the most frequent keys with their counts."""
    return sorted(counts.items(), key=lambda row: (-row[1], str(row[0])))[:LISTED]


def _shares(counts: Counter[str] | Counter[int], total: int) -> dict[str, float]:
    return {str(name): round(count / total, 6) for name, count in _frequent(counts)} if total else {}
