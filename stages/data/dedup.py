"""Curate: near duplicates over all sources, then the held-out split.

Of all documents together only dispositions are held in memory, the pairs that share a bucket, and the texts of near
duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, operational
from stages.data.filters.settings import Kind, MinHash, Shards
from stages.data.table import DISPOSITIONS, DOCUMENTS, KEPT, stream_rows, write_json, write_rows, writing

VERSION = 2


class CuratedSource(Config):
    """What curation needs to know of one source."""

    name: SourceName
    kind: Kind
    heldout_fraction: Annotated[float, Range(0, 1, below=True)]


class CurateConfig(Config):
    sources: tuple[CuratedSource, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    minhash: MinHash | None
    shards: Shards = operational(1, "with more than one, the buckets of MinHash are tasks of an array on a cluster")

    def sought(self) -> list[str]:
        """The sources among whose documents near duplicates are sought."""
        return [s.name for s in self.sources if self.minhash is not None and s.kind in self.minhash.kinds]


def run(config: CurateConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal kept documents by source, one disposition for every input document, and a summary.

    inputs["filter"]: what the steps left of each source. Resumes after the last bucket that was finished. Raises
    AtomError if counts do not balance.
    """
    from loguru import logger

    from stages.data.filters import near_duplicates
    from stages.data.filters.dispositions import Dispositions

    logger.disable("datatrove")
    filtered = inputs["filter"]
    dispositions = Dispositions.of(stream_rows(filtered / "dispositions.parquet", list(DISPOSITIONS)))
    removed: dict[str, near_duplicates.Near] = {}
    if config.minhash is not None and config.sought():

        def pairs(settings: MinHash) -> Iterator[bytes]:
            for bucket in range(settings.num_buckets):
                yield near_duplicates.find_pairs(filtered / "signatures", work, settings, bucket)
                report.progress(bucket + 1, settings.num_buckets + 1, "buckets")

        files = [filtered / "kept" / f"{name}.parquet" for name in config.sought()]
        removed = near_duplicates.near(files, pairs(config.minhash), work, config.minhash)

    written: Counter[str] = Counter()
    for source in config.sources:
        with writing(out / "kept" / f"{source.name}.parquet", KEPT) as write:
            for row in stream_rows(filtered / "kept" / f"{source.name}.parquet", list(DOCUMENTS)):
                if twin := removed.get(row["id"]):
                    dispositions.remove(row["id"], "near_duplicate", *twin.measured, duplicate_of=twin.id)
                    continue
                split = split_of(row["content_hash"], source.heldout_fraction)
                dispositions.keep(row["id"], split, row["content_hash"])
                write({**row, "split": split})
                written[source.name] += 1
    write_rows(out / "dispositions.parquet", DISPOSITIONS, dispositions.close(written))
    summary = dispositions.summary(filtered.json("edits.json"))
    write_json(out / "summary.json", summary)
    for name, part in summary["sources"].items():
        fallen = ", ".join(f"{rule} {n}" for rule, n in part["removed"].most_common())
        report.note(f"{name}: {part['documents_in']} in, {part['kept'].total()} kept; removed: {fallen or 'none'}")


def split_of(content_hash: str, heldout_fraction: float) -> str:
    """The text alone decides: where its hash lies among all."""
    return "heldout" if int(content_hash[:16], 16) < heldout_fraction * 2**64 else "train"


def run_shard(config: CurateConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """The pairs of documents that share one bucket of MinHash, kept in `work`."""
    from loguru import logger

    from stages.data.filters import near_duplicates

    logger.disable("datatrove")
    if config.minhash is not None and config.sought():
        near_duplicates.find_pairs(inputs["filter"] / "signatures", work, config.minhash, shard)


def shards(config: CurateConfig) -> int:
    return config.minhash.num_buckets if config.minhash is not None and config.sought() and config.shards > 1 else 1


def estimate(config: CurateConfig) -> Estimate:
    return Estimate(cpu_seconds=10.0, fixed=True)


STAGE = Stage("curate", VERSION, CurateConfig, run, estimate=estimate, shards=shards, run_shard=run_shard)
