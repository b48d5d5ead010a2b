"""Dedup: remove near duplicates over all sources, then assign the held-out split.

Memory contains only the dispositions of all documents, the pairs that share a bucket, and the texts of near duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, SourceName
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, operational
from stages.data.curation.settings import MinHash, Shards
from stages.data.kinds import Kind
from stages.data.splits import HeldoutFraction, split_of
from stages.data.table import DISPOSITIONS, DOCUMENTS, KEPT, row_writer, stream_rows, write_json, write_rows

VERSION = 2


class DedupSource(Config):
    """The settings of one source that curation uses."""

    name: SourceName = Field(description="name of the source")
    kind: Kind = Field(description="kind of the documents")
    heldout_fraction: HeldoutFraction = Field(description="share of documents held out from training")


class DedupConfig(Config):
    sources: tuple[DedupSource, ...] = Field(min_length=1, max_length=MOST_SOURCES, description="sources of the corpus")
    minhash: MinHash | None = Field(description="near-duplicate removal; null: none")
    shards: Shards = operational(1, "above 1, the buckets of MinHash run as a job array")

    def deduplicated_sources(self) -> list[str]:
        """The sources whose documents are searched for near duplicates."""
        return [s.name for s in self.sources if self.minhash is not None and s.kind in self.minhash.kinds]


def run(config: DedupConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal kept documents by source, one disposition for every input document, and a summary.

    inputs["filter"]: the filtered documents of each source. Resumes after the last finished bucket. Raises AtomError if
    counts do not balance.
    """
    from loguru import logger

    from stages.data.curation import near_duplicates
    from stages.data.curation.dispositions import Dispositions

    logger.disable("datatrove")
    filtered = inputs["filter"]
    dispositions = Dispositions.from_rows(stream_rows(filtered / "dispositions.parquet", list(DISPOSITIONS)))
    removed: dict[str, near_duplicates.NearDuplicate] = {}
    if config.minhash is not None and config.deduplicated_sources():

        def pairs(settings: MinHash) -> Iterator[bytes]:
            for bucket in range(settings.num_buckets):
                yield near_duplicates.find_pairs(filtered / "signatures", work, settings, bucket)
                report.progress(bucket + 1, settings.num_buckets + 1, "buckets")

        files = [filtered / "kept" / f"{name}.parquet" for name in config.deduplicated_sources()]
        removed = near_duplicates.find_near_duplicates(files, pairs(config.minhash), work, config.minhash)

    written: Counter[str] = Counter()
    for source in config.sources:
        with row_writer(out / "kept" / f"{source.name}.parquet", KEPT) as write:
            for row in stream_rows(filtered / "kept" / f"{source.name}.parquet", list(DOCUMENTS)):
                if duplicate := removed.get(row["id"]):
                    dispositions.remove(row["id"], "near_duplicate", *duplicate.measured, duplicate_of=duplicate.id)
                    continue
                split = split_of(row["content_hash"], source.heldout_fraction)
                dispositions.keep(row["id"], split, row["content_hash"])
                write({**row, "split": split})
                written[source.name] += 1
    write_rows(out / "dispositions.parquet", DISPOSITIONS, dispositions.close(written))
    summary = dispositions.summary(filtered.json("edits.json"))
    write_json(out / "summary.json", summary)
    for name, counts in summary["sources"].items():
        rules = ", ".join(f"{rule} {n}" for rule, n in counts["removed"].most_common())
        report.note(f"{name}: {counts['documents_in']} in, {counts['kept'].total()} kept; removed: {rules or 'none'}")


def run_shard(config: DedupConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Finds the pairs of documents that share one MinHash bucket and caches them in `work`."""
    from loguru import logger

    from stages.data.curation import near_duplicates

    logger.disable("datatrove")
    if config.minhash is not None and config.deduplicated_sources():
        near_duplicates.find_pairs(inputs["filter"] / "signatures", work, config.minhash, shard)


def shards(config: DedupConfig) -> int:
    return (
        config.minhash.num_buckets
        if config.minhash is not None and config.deduplicated_sources() and config.shards > 1
        else 1
    )


def estimate(config: DedupConfig) -> Estimate:
    return Estimate(cpu_seconds=10.0, fixed=True)


STAGE = Stage("dedup", VERSION, DedupConfig, run, estimate=estimate, shards=shards, run_shard=run_shard)
