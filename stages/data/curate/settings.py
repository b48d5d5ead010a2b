"""Settings of the curation of all sources together, and the parts of the sources."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, model_validator

from pipeline.core.bounds import MOST_SOURCES, LongLine, Range, Sha256, SourceName, Words
from pipeline.core.parts import PartCount, part_file
from pipeline.core.stage import Config, added, operational
from stages.formats.table import Kind

Hashes = Annotated[int, Range(1, 1000, "FineWeb: 14 buckets of 8 hashes over 5 words")]

# Files that one process keeps open, however many parts there are.
REPRESENTATIVE_BLOCKS = 100
PART_BITS, ROW_BITS = 17, 36  # 100,000 parts; with 10 bits for the source below 2^63


class MinHash(Config):
    """Near-duplicate removal by MinHash LSH over word n-grams.

    Pairs are likely found if their similarity is above (1 / num_buckets) ^ (1 / hashes_per_bucket).
    """

    kinds: tuple[Kind, ...] = Field(default=("prose", "code"), max_length=len(get_args(Kind)))
    """kinds of sources that are deduplicated"""
    n_grams: Hashes = Field(default=5)
    """words of an n-gram"""
    num_buckets: Hashes = Field(default=14)
    """number of LSH buckets"""
    hashes_per_bucket: Hashes = Field(default=8)
    """hashes in each bucket"""

    @property
    def threshold(self) -> float:
        """The similarity at which the LSH curve is steepest."""
        return float((1 / self.num_buckets) ** (1 / self.hashes_per_bucket))


@dataclass(frozen=True)
class SourcePart:
    """A part of a source, by its files in a folder of parts of sources.

    Attributes:
        number: The number of the source, from 0.
        source: The name of the source.
        part: The number of the part.
    """

    number: int
    source: str
    part: int

    @property
    def first(self) -> int:
        """The address of its first document."""
        return (self.number << PART_BITS | self.part) << ROW_BITS

    @property
    def end(self) -> int:
        return self.first + (1 << ROW_BITS)

    def file(self, folder: Path) -> Path:
        return folder / self.source / part_file(self.part)


@dataclass(frozen=True)
class Partition:
    """A range of the values of a column of hashes: the n-th of `count` equal ones."""

    column: str
    n: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.column}-{self.n:05d}-of-{self.count:05d}"

    def bounds(self) -> tuple[int, int]:
        """Returns the smallest and the largest value."""
        # By Python's integers, since 2**64 does not fit into 64 bits.
        return 2**64 * self.n // self.count, 2**64 * (self.n + 1) // self.count - 1


class SourceParts(Config):
    """The parts of one source."""

    name: SourceName
    """name of the source"""
    parts: PartCount = added(1)
    """parts of the source"""


class DeduplicationConfig(Config):
    """Base of the settings of the stages of deduplication, which choose what they need of a source."""

    sources: tuple[SourceParts, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    """sources of the corpus"""
    minhash: MinHash | None
    """near-duplicate removal; null: none"""

    def parts(self) -> list[SourcePart]:
        """Returns the parts of all sources, in order."""
        return [SourcePart(n, s.name, part) for n, s in enumerate(self.sources) for part in range(s.parts)]


def expression_problem(pattern: str) -> str | None:
    """Says why a text is no regular expression; None if it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no regular expression: {error}"
    return None


def _work_problem(pattern: str) -> str | None:
    if (problem := expression_problem(pattern)) or not pattern or re.compile(pattern).groups:
        return problem
    return "has no group; put the part that names the work in parentheses"


# A regular expression whose first group names the work of a document; empty: every document is a work of its own.
WorkPattern = Annotated[str, Words(500, empty=True, test=_work_problem)]


def work_of(pattern: re.Pattern[str], id: str, origin: str) -> str | None:
    """Returns the work that a document is a part of, such as its package; None if it is a work of its own.

    Args:
        pattern: It is searched in the id and the origin, with a space between; its first group is the work.
        id: Id of the document.
        origin: Its origin.
    """
    match = pattern.search(f"{id} {origin}")
    return match[1] if match else None


def no_counts() -> dict[str, Any]:
    """Returns the counts of a part or a source in the summary, of no document; `works` has the held-out ones."""
    numbers = dict.fromkeys(("documents_in", "bytes_in", "removed_bytes", "written"), 0)
    return {**numbers, "kept": Counter[str](), "removed": Counter[str](), "works": Counter[str]()}


# Consecutive words that make a match.
Ngram = Annotated[int, Range(1, 1000, "GPT-3: 13")]


class Decontamination(Config):
    """Removal of documents that contain `ngram` consecutive words of an evaluation item, or all of a shorter one."""

    ngram: Ngram = Field(default=13)
    """consecutive words of an item that make a match"""


class CurationSettings(Config):
    """Curation of all sources together, after the steps of each."""

    decontamination: Decontamination = Field(default=Decontamination())
    """removal of documents that contain evaluation items"""
    minhash: MinHash | None = Field(default=MinHash())
    """near-duplicate removal; null: none"""
    deny_list: LongLine | None = operational(None)
    """file of documents to remove on request (docs/opt-out.md); its digest, not the path, is part of the key"""
    deny_list_sha256: Sha256 | None = added(None)
    """expected digest of the deny-list; null: computed from the file present"""
    alarm_share: Annotated[float, Range(0, 1)] = operational(0.5)
    """a rule that removes a larger share of a source stops the run, unless acknowledged_removals of it allow that"""

    @model_validator(mode="after")
    def _check_lists(self) -> CurationSettings:
        if self.deny_list_sha256 is not None and self.deny_list is None:
            raise ValueError("deny_list_sha256 is the digest of a deny-list; name the file in deny_list")
        return self
