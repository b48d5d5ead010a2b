"""Dedup: remove exact and near duplicates over all sources, then assign the held-out split.

Documents with equal hashes are found by partition: of the text's hash, and of each band of MinHash. The partitions are
independent; what they find is joined, and then each part is rewritten. Memory does not grow with the corpus, but for 16
bytes for each document that shares a band with another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.parts import PartCount, link_parts, seal_part, sealed_part
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from stages.data import estimates
from stages.data.curation.settings import MinHash
from stages.data.estimates import Size
from stages.data.kinds import Kind
from stages.data.processes import processes
from stages.data.splits import HeldoutFraction
from stages.data.table import write_json

if TYPE_CHECKING:
    from stages.data.curation.duplicates import Part, Partition, Removed

VERSION = 3
PARTS_PER_RANGE = 500
"""Parts of a corpus for each range of hashes: a range has some ten million documents, which DuckDB sorts in memory."""
ALARM = 0.9
ALARM_DOCUMENTS = 100


class DedupSource(Config):
    """The settings of one source that curation uses."""

    name: SourceName = Field(description="name of the source")
    kind: Kind = Field(description="kind of the documents")
    heldout_fraction: HeldoutFraction = Field(description="share of documents held out from training")
    parts: PartCount = added(1, "parts of the source")


class DedupConfig(Config):
    sources: tuple[DedupSource, ...] = Field(min_length=1, max_length=MOST_SOURCES, description="sources of the corpus")
    minhash: MinHash | None = Field(description="near-duplicate removal; null: none")
    expected: Size | None = operational(None, "expected size of all sources; null: unknown")

    @property
    def searched_kinds(self) -> tuple[Kind, ...]:
        """The kinds of sources whose documents are searched for near duplicates."""
        return self.minhash.kinds if self.minhash is not None else ()

    def parts(self) -> list[Part]:
        """The parts of all sources, in order."""
        from stages.data.curation.duplicates import Part

        return [Part(n, s.name, part) for n, s in enumerate(self.sources) for part in range(s.parts)]

    def searched(self, part: Part) -> bool:
        return self.sources[part.number].kind in self.searched_kinds

    def partitions(self) -> list[Partition]:
        """The partitions of the exact search, then those of each band."""
        from stages.data.curation.duplicates import Partition

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


def run(config: DedupConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal kept documents and dispositions of every input document by part, and a summary.

    inputs["filter"]: the filtered documents of each part, with hashes. Uses all cores that the process may use. Resumes
    after the last finished partition or part. Raises AtomError if counts do not balance.
    """
    from stages.data.curation.representatives import blocks_of

    filtered, parts = inputs["filter"], config.parts()
    with processes(len(parts) if shards(config) > 1 else 1) as for_each:

        def work_on(step: Callable[[DedupConfig, Path, Path, int], None], count: int, unit: str) -> None:
            for done in for_each(partial(step, config, filtered.path, work), count):
                report.progress(done, count, unit)

        work_on(_find_stars, len(config.partitions()), "partitions")
        _join_stars(config, work)
        work_on(_copy_representatives, len(blocks_of(parts)), "blocks")
        work_on(_rewrite, len(parts), "parts")
    sealed = [sealed_part(work / _name(part)) for part in parts]
    link_parts((part for part in sealed if part is not None), out)
    summary = _summarize(config, [part.facts for part in sealed if part is not None], filtered.json("edits.json"))
    write_json(out / "summary.json", summary)
    for name, counts in summary["sources"].items():
        rules = ", ".join(f"{rule} {n}" for rule, n in counts["removed"].most_common())
        report.note(f"{name}: {counts['documents_in']} in, {counts['kept'].total()} kept; removed: {rules or 'none'}")
        duplicates = sum(counts["removed"][rule] for rule in ("exact_duplicate", "near_duplicate"))
        if (total := counts["kept"].total() + duplicates) > ALARM_DOCUMENTS and duplicates > ALARM * total:
            report.note(
                f"{name}: {duplicates} of {total} documents are duplicates; if that is unexpected, look at their "
                f"`duplicate_of`, and set n_grams or the bands of minhash for such text"
            )


def run_shard(config: DedupConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Finds the documents with equal hashes in one partition."""
    _find_stars(config, inputs["filter"].path, work, shard)


def shards(config: DedupConfig) -> int:
    """The partitions; 1 for a corpus so small that no source has several parts."""
    return len(config.columns) * config.ranges if any(source.parts > 1 for source in config.sources) else 1


def _find_stars(config: DedupConfig, filtered: Path, work: Path, number: int) -> None:
    from stages.data.curation.duplicates import write_stars

    partition = config.partitions()[number]
    parts = [part for part in config.parts() if partition.column == "hash_high" or config.searched(part)]

    def make(folder: Path) -> dict[str, Any]:
        return {"stars": write_stars(folder, filtered / "hashes", parts, partition)}

    seal_part(work / "stars", partition.name, make)


def _join_stars(config: DedupConfig, work: Path) -> None:
    """Finds the exact and the near duplicates from the stars of all partitions."""
    from stages.data.curation.duplicates import Removed, write_exact, write_near

    stars: dict[bool, list[Path]] = {True: [], False: []}
    for partition in config.partitions():
        stars[partition.column == "hash_high"].append(work / "stars" / partition.name)
    searched = [number for number, source in enumerate(config.sources) if source.kind in config.searched_kinds]

    def find_near(folder: Path) -> dict[str, Any]:
        return {"documents": write_near(folder, work, stars[False], Removed(work / "removed/exact"), searched)}

    seal_part(work / "removed", "exact", lambda folder: {"documents": write_exact(folder, work, stars[True])})
    seal_part(work / "removed", "near", find_near)


def _removed(work: Path) -> tuple[Removed, Removed]:
    """The exact and the near duplicates."""
    from stages.data.curation.duplicates import Removed

    return Removed(work / "removed/exact"), Removed(work / "removed/near")


def _copy_representatives(config: DedupConfig, filtered: Path, work: Path, number: int) -> None:
    from stages.data.curation.representatives import blocks_of, write_representatives

    block, removed = blocks_of(config.parts())[number], _removed(work)
    n_grams = config.minhash.n_grams if config.minhash else 1

    def make(folder: Path) -> dict[str, Any]:
        return {"documents": write_representatives(folder, filtered / "kept", block, *removed, n_grams)}

    seal_part(work / "representatives", f"block-{number:05d}", make)


def _rewrite(config: DedupConfig, filtered: Path, work: Path, number: int) -> None:
    from stages.data.curation.removal import PartRemoval
    from stages.data.curation.representatives import Representatives, blocks_of

    parts = config.parts()
    part, source = parts[number], config.sources[parts[number].number]
    folders = [work / "representatives" / f"block-{block:05d}" for block in range(len(blocks_of(parts)))]

    def make(folder: Path) -> dict[str, Any]:
        removal = PartRemoval(
            filtered,
            part,
            source.heldout_fraction,
            *_removed(work),
            Representatives(folders, parts),
            config.minhash,
        )
        return removal.write(folder)

    seal_part(work, _name(part), make)


def _name(part: Part) -> str:
    return f"{part.source}-{part.part:05d}"


def _summarize(config: DedupConfig, facts: list[dict[str, Any]], edits: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Documents and bytes, in, kept by split, and removed by rule; by source and in total. facts: of each part.

    Raises AtomError if the counts of a source do not balance.
    """
    sources: dict[str, Any] = {source.name: _empty() for source in config.sources}
    total = _empty()
    for part, counts in zip(config.parts(), facts, strict=True):
        for sums in (sources[part.source], total):
            for name, value in counts.items():
                sums[name] += Counter(value) if isinstance(value, dict) else value
    for name, counts in sources.items():
        kept, removed = counts["kept"].total(), counts["removed"].total()
        undecided = counts["documents_in"] - kept - removed
        if undecided or counts["written"] != kept:
            raise AtomError(
                f"source {name} does not balance: {counts['documents_in']} in, {kept} kept ({counts['written']} "
                f"written), {removed} removed, {undecided} without a disposition; this is a fault of curation"
            )
    for counts in (*sources.values(), total):
        del counts["written"]
    by_source = {name: {**counts, "edited": edits.get(name, {})} for name, counts in sorted(sources.items())}
    return {"sources": by_source, "total": total}


def _empty() -> dict[str, Any]:
    numbers = dict.fromkeys(("documents_in", "bytes_in", "removed_bytes", "written"), 0)
    return {**numbers, "kept": Counter(), "removed": Counter()}


def estimate(config: DedupConfig) -> Estimate:
    return estimates.estimate("dedup", config.expected, small=10.0)


STAGE = Stage("dedup", VERSION, DedupConfig, run, estimate=estimate, shards=shards, run_shard=run_shard)
