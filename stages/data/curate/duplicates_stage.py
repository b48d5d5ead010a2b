"""Duplicates: find the exact and near duplicates over all sources.

Documents with equal hashes are found by partition: of the text's hash, and of each band of MinHash. The partitions are
independent, and what they find is joined. Memory does not grow with the corpus, but for 16 bytes for each document that
shares a band with another. Stage `dedup` removes what is found here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES
from pipeline.core.parts import Part, link_parts, seal_part
from pipeline.core.stage import Estimate, Inputs, Report, Stage, operational
from stages.data import estimates
from stages.data.curate.settings import DeduplicationConfig, Partition, SourcePart, SourceParts
from stages.data.estimates import Size
from stages.formats.database import connect
from stages.formats.table import Kind

if TYPE_CHECKING:
    import duckdb


VERSION = 1
# Parts of a corpus for each range of hashes: a range has some ten million documents.
PARTS_PER_RANGE = 500
# Of the database that groups the rows of a partition.
MEMORY = "250MB"


class SearchedSource(SourceParts):
    """The settings of one source that the search uses."""

    kind: Kind
    """kind of the documents"""


class DuplicatesConfig(DeduplicationConfig):
    sources: tuple[SearchedSource, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    """sources of the corpus"""
    expected: Size | None = operational(None)
    """expected size of all sources; null: unknown"""

    @property
    def searched_kinds(self) -> tuple[Kind, ...]:
        """The kinds of sources whose documents are searched for near duplicates."""
        return self.minhash.kinds if self.minhash is not None else ()

    def searched(self, part: SourcePart) -> bool:
        return self.sources[part.number].kind in self.searched_kinds

    def partitions(self) -> list[Partition]:
        """Returns the partitions of the exact search, then those of each band."""
        return [Partition(column, n, self.ranges) for column in self.columns for n in range(self.ranges)]

    @property
    def ranges(self) -> int:
        """The partitions of a column of hashes."""
        return -(-sum(source.parts for source in self.sources) // PARTS_PER_RANGE)

    @property
    def columns(self) -> list[str]:
        """The columns of hashes that are searched."""
        buckets = 0
        if self.minhash is not None and any(source.kind in self.searched_kinds for source in self.sources):
            buckets = self.minhash.num_buckets
        return ["hash_high", *(f"band_{band:02d}" for band in range(buckets))]


def run(config: DuplicatesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `removed/exact` and `removed/near`: the documents to remove, and which ones they duplicate.

    With a deny-list also `removed/opt_out`: those that requests reach through a denied document. `inputs["filter"]`
    holds the hashes of each part. Resumes after the last finished partition.
    """
    count = len(config.partitions())
    with connect(work, MEMORY) as database:
        for number in range(count):
            _find_stars(database, config, inputs["filter"].path, work, number)
            report.progress(number + 1, count, "partitions")
    joined = _join_stars(config, inputs["filter"].path, work)
    link_parts(joined.values(), out)
    report.note(", ".join(f"{name}: {part.facts['documents']} documents" for name, part in joined.items()))


def run_shard(config: DuplicatesConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Finds the documents with equal hashes in one partition."""
    with connect(work, MEMORY) as database:
        _find_stars(database, config, inputs["filter"].path, work, shard)


def shards(config: DuplicatesConfig) -> int:
    """Returns the partitions; 1 for a corpus so small that no source has several parts."""
    return len(config.columns) * config.ranges if any(source.parts > 1 for source in config.sources) else 1


def _find_stars(
    database: duckdb.DuckDBPyConnection, config: DuplicatesConfig, filtered: Path, work: Path, number: int
) -> None:
    from stages.data.curate.duplicate_groups import write_stars
    from stages.data.curate.opt_out_copies import denied_parts

    partition = config.partitions()[number]
    parts = [part for part in config.parts() if partition.column == "hash_high" or config.searched(part)]
    parts += denied_parts(filtered, config.parts())

    def make(folder: Path) -> dict[str, Any]:
        return {"stars": write_stars(database, folder, filtered / "hashes", parts, partition)}

    seal_part(work / "stars", partition.name, make)


def _join_stars(config: DuplicatesConfig, filtered: Path, work: Path) -> dict[str, Part]:
    """Returns the exact and the near duplicates, and what requests reach, from the stars of all partitions."""
    from stages.data.curate.duplicate_groups import Removed, removed_folder, write_exact, write_near
    from stages.data.curate.opt_out_copies import OptOuts, denied_parts, write_opt_outs

    stars: dict[bool, list[Path]] = {True: [], False: []}
    for partition in config.partitions():
        stars[partition.column == "hash_high"].append(work / "stars" / partition.name)
    searched = [number for number, source in enumerate(config.sources) if source.kind in config.searched_kinds]

    def find_exact(folder: Path) -> dict[str, Any]:
        return {"documents": write_exact(removed_folder(folder, "exact"), work, stars[True])}

    def find_opt_outs(folder: Path) -> dict[str, Any]:
        target, parts = removed_folder(folder, "opt_out"), config.parts()
        return {"documents": write_opt_outs(target, work, filtered, parts, stars[True], stars[False])}

    joined = {"exact": seal_part(work, "exact", find_exact)}
    if denied_parts(filtered, config.parts()):
        joined["opt_out"] = seal_part(work, "opt_out", find_opt_outs)

    def find_near(folder: Path) -> dict[str, Any]:
        removed = Removed(removed_folder(joined["exact"].folder, "exact"))
        opt_outs = OptOuts(removed_folder(work / "opt_out", "opt_out")).addresses
        documents = write_near(removed_folder(folder, "near"), work, stars[False], removed, searched, opt_outs)
        return {"documents": documents}

    joined["near"] = seal_part(work, "near", find_near)
    return joined


def estimate(config: DuplicatesConfig) -> Estimate:
    return estimates.estimate("duplicates", config.expected, small=5.0)


STAGE = Stage("duplicates", VERSION, DuplicatesConfig, run, estimate=estimate, shards=shards, run_shard=run_shard)
