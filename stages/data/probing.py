"""Estimates a source from a sample: its reader and its steps run on the pieces of the sample.

Of a piece that is a whole file, a random share of the documents is read if the reader can leave out the others, as that
of packages can, and otherwise the first ones: how far the file is read then says for how much of it they stand.

Time and memory grow with the sample, of which the content hashes of the kept documents stay in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from stages.confidence import Z95, root_of_squares, wilson, work_deviations
from stages.data.acquire.acquire_stage import document_row, documents_of
from stages.data.acquire.hub_samples import Piece, Sample
from stages.data.acquire.readers.base import (
    FAILED_RULE,
    REFUSED_RULES,
    Document,
    Failed,
    Failures,
    Refused,
    Unmapped,
    Unreadable,
)
from stages.data.acquire.readers.row_files import Row, RowReader, field_at, in_words
from stages.data.acquire.source_probe import (
    DUPLICATE,
    LEAST_BYTES,
    LISTED,
    LONG,
    MOST,
    MOST_BYTES,
    MOST_RULES,
    LicenseString,
    Probe,
    RuleShare,
)
from stages.data.curate.alarms import MIN_DOCUMENTS
from stages.data.curate.decontamination import ContaminationIndex
from stages.data.curate.filters.own import most_probable
from stages.data.curate.source_filter import SECRETS, Removed, SourceFilter
from stages.data.recipe import SourceConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# {format of the files: what a piece is}; of other formats it is a file.
SAMPLED: Mapping[str, Literal["row groups", "heads"]] = {"parquet": "row groups", "jsonl": "heads"}
# Strings of a license field that are compared between files; a free text could differ in every row.
MOST_STRINGS = 1000
# Of a piece that is a whole file, the bytes of text after which no more of it is read, and the bytes of which a thinned
# reader reads the documents.
PIECE_TEXT = 2**21
# The folders of an absolute path, which no lock file has.
FOLDERS = re.compile(r"(?<![\w:/.-])/(?:[^/\s]+/)+")
# Fields of a probe; a hostile file may have any number.
MOST_FIELDS = 100


@dataclass
class _PieceCounts:
    """The counts of a piece.

    Attributes:
        piece: The piece.
        sums: `rows`, `documents`, `bytes` of their text, and `kept_bytes`.
        removed: Documents by the rule that removed them.
        licenses: {(string, SPDX expression or an empty text): rows}.
        part: The part of a whole file that was read.
    """

    piece: Piece
    sums: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    licenses: Counter[tuple[str, str]] = field(default_factory=Counter)
    part: float = 1.0

    @property
    def share(self) -> float:
        """The share that was read of what the piece stands for."""
        return self.part if self.piece.rows is None else self.sums["rows"] / max(self.piece.rows, 1)

    def scaled(self, name: str) -> float:
        """Returns a sum over all that the piece stands for."""
        return self.sums[name] / self.share if self.share else 0.0

    def add_license(self, stated: str, license: str | None) -> None:
        if len(self.licenses) < MOST_STRINGS:
            self.licenses[_bounded(stated), license or ""] += 1


class Measurement:
    """A source, measured by the pieces of its sample.

    Attributes:
        hashes: Content hashes of the kept documents.
        problems: Sentences on what is wrong with the source.
    """

    def __init__(
        self, source: SourceConfig, sample: Sample, total_bytes: int, tokenizer: Tokenizer | None = None
    ) -> None:
        """Runs the reader and the steps of a source.

        Args:
            source: The source.
            sample: Its sample.
            total_bytes: Bytes of all of its files.
            tokenizer: Counts the tokens; None: `bytes_per_token` of the source does.
        """
        self.source, self.sample, self.total_bytes, self.tokenizer = source, sample, total_bytes, tokenizer
        self.hashes, self.problems = set[str](), list(sample.problems)
        self.counts: list[_PieceCounts] = []
        self.kept_tokens = 0.0
        self.languages, self.long = Counter[str](), Counter[int]()
        self.failures = Failures(f"source {source.name}", "cannot be read; check the settings of its reader")
        try:
            index, allowed = ContaminationIndex((), 1), source.license_allow
            # A classifier is trained later, on documents of several sources.
            steps = [step for step in source.steps if not step.inputs]
            self.steps = SourceFilter(source.name, source.kind, steps, index, allowed)
            for piece in sample.pieces:
                self._read(piece)
            self._require_usable()
        except AtomError as error:
            self.problems.append(str(error))

    def _read(self, piece: Piece) -> None:
        """Counts the rows and the documents of a piece."""
        source, counts, files = self.source, _PieceCounts(piece), [(piece.file, piece.path)]
        if piece.rows is not None:
            self._read_rows(counts)
        elif thinned := source.reader.thinned(part := min(1.0, PIECE_TEXT / piece.bytes)):
            source, counts.part = source.model_copy(update={"reader": thinned}), part
        for document in documents_of(source, 0, files, Counter()):
            if isinstance(document, Unreadable):
                continue
            counts.sums["documents"] += 1
            if isinstance(document, Failed):
                counts.removed[FAILED_RULE] += 1
                self.failures.add(document.name, document.reason)
            elif isinstance(document, Refused):
                counts.removed[REFUSED_RULES[document.kind]] += 1
            else:
                self._curate(document, counts)
                if piece.rows is None:
                    self._add_license(document, counts)
                    if source is self.source and self._is_enough(counts):
                        break
        self.counts.append(counts)

    def _read_rows(self, counts: _PieceCounts) -> None:
        """Counts the rows of a piece, and what they state of licenses."""
        piece, reader = counts.piece, self.source.reader
        assert isinstance(reader, RowReader)
        licenses = reader.licenses
        for row in reader.rows([(piece.file, piece.path)]):
            counts.sums["rows"] += 1
            if isinstance(row, Row) and reader.reads(row) and reader.license_field:
                stated = field_at(row.fields, reader.license_field)
                counts.add_license(in_words(stated), licenses.expression(stated))

    def _add_license(self, document: Document | Unmapped, counts: _PieceCounts) -> None:
        """Counts what a document states of its license."""
        counts.sums["rows"] += 1
        if isinstance(document, Unmapped):
            counts.add_license(document.license, None)
        else:
            license = document.license or self.source.document_license or self.source.license
            counts.add_license(document.stated or license, license)

    def _is_enough(self, counts: _PieceCounts) -> bool:
        """Returns True if no more of a whole file is to be read, and notes the part that was."""
        if counts.sums["bytes"] < PIECE_TEXT or (position := _position(counts.piece.path)) is None:
            return False
        counts.part = position / counts.piece.bytes
        return True

    def _curate(self, document: Document | Unmapped, counts: _PieceCounts) -> None:
        """Counts a document as removed by the first rule that does so, or as kept."""
        size = len(document.text.encode())
        counts.sums["bytes"] += size
        if self.source.kind != "code":
            self.languages[most_probable(document.text)] += size
        if isinstance(document, Unmapped):
            counts.removed[REFUSED_RULES["license"]] += 1
            return
        result = self.steps.apply(document_row(self.source, f"{self.source.name}/{document.name}", document))
        if isinstance(result, Removed):
            counts.removed[result.rule] += 1
        elif result["content_hash"] in self.hashes:
            counts.removed[DUPLICATE] += 1
        else:
            self.hashes.add(result["content_hash"])
            kept = len(result["text"].encode())
            tokens = kept / self.source.bytes_per_token
            if self.tokenizer is not None:
                tokens = len(self.tokenizer.encode(result["text"], add_special_tokens=False).ids)
            self.kept_tokens += tokens
            counts.sums["kept_bytes"] += kept
            self.long.update({n: kept for n in LONG if tokens > n})

    def _require_usable(self) -> None:
        """Raises AtomError for a source at which acquire or filter would stop, or of whose licenses none is known."""
        documents = self._sum("documents")
        if not documents and not self.problems:
            raise AtomError(f"source {self.source.name}: its sample has no document; check its reader")
        for failures in (self.failures, self.steps.failures):
            failures.require_few(documents)
        self._require_licenses()

    def _require_licenses(self) -> None:
        reader, counts = self.source.reader, [each for each in self.counts if each.licenses]
        # What a package or a page states, no setting changes.
        if not isinstance(reader, RowReader) or reader.license_field is None:
            return
        if counts and not any(string for each in counts for string, _ in each.licenses):
            fields = ", ".join(list(self.sample.fields)[:LISTED])
            raise AtomError(
                f"source {self.source.name}: no sampled row states a license in {reader.license_field} (fields: "
                f"{fields}); set reader.license_field"
            )
        # A piece whose strings are all unknown is spelled in another way; of few rows, it may be chance.
        unknown = [each for each in counts if not any(license for _, license in each.licenses)]
        for each in unknown:
            if each.sums["rows"] >= MIN_DOCUMENTS:
                others = "nor is any other" if len(unknown) == len(counts) else "those of other files are"
                raise AtomError(
                    f"source {self.source.name}: no license string of {escaped(each.piece.file, 200)} is known, such "
                    f"as {max(each.licenses)[0]!r}, and {others}; add them to reader.license_strings"
                )

    def probe(self, settings: str, sampled: str, tokens_by: str) -> Probe:
        """Returns the entry of the lock file.

        Args:
            settings: The digest of the settings of the source.
            sampled: The format of its files.
            tokens_by: What counted the tokens, in the words of a lock file.
        """
        documents, tokens = self._sum("documents"), self.source.bytes_per_token
        if self.kept_tokens:
            tokens = min(max(self._sum("kept_bytes") / self.kept_tokens, LEAST_BYTES), MOST_BYTES)
        kept, half = self._estimate("kept_bytes")
        removed = sum((each.removed for each in self.counts), Counter[str]())
        licenses = sum((each.licenses for each in self.counts), Counter[tuple[str, str]]())
        return Probe(
            settings=settings,
            sampled=SAMPLED.get(sampled, "files"),
            pieces=len(self.counts),
            problem=_bounded(FOLDERS.sub("…/", "; ".join(self.problems[:3])), 1000),
            sampled_documents=documents,
            sampled_bytes=self._sum("bytes"),
            kept_documents=len(self.hashes),
            documents=round(self._estimate("documents")[0]),
            bytes=round(self._estimate("bytes")[0]),
            kept_bytes=round(kept),
            kept_low=None if half is None else max(0, round(kept - half)),
            kept_high=None if half is None else round(min(kept + half, MOST)),
            bytes_per_token=round(tokens, 6),
            tokens_by=tokens_by,
            kept_tokens=round(kept / tokens),
            secrets=sum(count for rule, count in removed.items() if rule.startswith(f"{SECRETS}/")),
            duplicates=removed[DUPLICATE],
            fields={
                _bounded(name): _bounded("|".join(sorted(kinds)))
                for name, kinds in sorted(self.sample.fields.items())[:MOST_FIELDS]
            },
            licenses=tuple(
                LicenseString(string=string, license=license, share=round(count / licenses.total(), 6))
                for (string, license), count in _frequent(licenses)
            ),
            languages=_shares(self.languages, self.languages.total()),
            removed={
                _bounded(rule): self._rule_share(rule, count, documents)
                for rule, count in _frequent(removed, MOST_RULES)
            },
            long_documents=_shares(self.long, self._sum("kept_bytes")),
        )

    def _sum(self, name: str) -> int:
        return sum(each.sums[name] for each in self.counts)

    def _estimate(self, name: str) -> tuple[float, float | None]:
        """Returns the estimate of a sum over the source, and half of its interval.

        The sum of the pieces by the bytes that they stand for is a ratio of sums (Cochran, Sampling Techniques, §6.3).
        A sample of all files has no error. Half is None for a single piece of a larger source.
        """
        pairs = [(each.scaled(name), max(1, round(each.piece.bytes))) for each in self.counts]
        if not pairs:
            return 0.0, 0.0
        scale = self.total_bytes / sum(size for _, size in pairs)
        # A Hub may state any size, and a file decompress to any.
        estimate = min(scale * math.fsum(value for value, _ in pairs), MOST)
        read = sum(each.piece.bytes * each.share for each in self.counts)
        unread = max(0.0, 1 - read / self.total_bytes)
        # Rounding to whole bytes leaves a little.
        if unread < len(pairs) / self.total_bytes:
            return estimate, 0.0
        if len(pairs) < 2:
            return estimate, None
        return estimate, Z95 * scale * root_of_squares(work_deviations(pairs).values()) * math.sqrt(unread)

    def _rule_share(self, rule: str, count: int, documents: int) -> RuleShare:
        """Returns a count with the wider of its intervals by documents (Wilson) and by pieces."""
        low, high = wilson(count, documents)
        pairs = [(each.removed[rule], number) for each in self.counts if (number := each.sums["documents"])]
        if len(pairs) > 1:
            half = Z95 * root_of_squares(work_deviations(pairs).values()) / documents
            low, high = min(low, max(0.0, count / documents - half)), max(high, min(1.0, count / documents + half))
        return RuleShare(documents=count, low=round(low, 6), high=round(high, 6))


def _position(path: Path) -> int | None:
    """Returns how many bytes are read of a file that a reader has open; None if it has not."""
    for entry in Path("/proc/self/fd").iterdir():
        # Other threads close theirs meanwhile, and that of the folder is closed by now.
        with suppress(FileNotFoundError):
            if entry.samefile(path):
                return os.lseek(int(entry.name), 0, os.SEEK_CUR)
    return None


def _bounded(text: str, longest: int = 200) -> str:
    """Returns a text of a stranger in one line; escaped twice, since an escape is longer than what it stands for."""
    return escaped(escaped(text, longest), longest)


def _frequent(counts: Counter[Any], most: int = LISTED) -> list[tuple[Any, int]]:
    """Returns the most frequent keys with their counts."""
    return sorted(counts.items(), key=lambda row: (-row[1], str(row[0])))[:most]


def _shares(counts: Counter[Any], total: int) -> dict[str, float]:
    return {str(name): round(count / total, 6) for name, count in _frequent(counts)} if total else {}
