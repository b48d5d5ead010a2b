"""Filter: the steps of each source, then decontamination and exact deduplication over all sources.

The order matters. Personal data is replaced before deduplication, so copies that differ only in an address are
duplicates. Contaminated documents are removed before duplicates, so the representative of a group of duplicates is
never removed afterwards. The steps run in one process for each shard: a small corpus is not worth the start-up of
datatrove's executor, some seconds for each step. Memory holds the digests and dispositions of all documents, and the
texts of one shard and of one row group of output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Seed, SourceName
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from pipeline.core.store import once
from stages.data.chat import prompt_chars
from stages.data.curation.settings import CurationSettings, MinHash
from stages.data.kinds import Kind
from stages.data.seeds import seed_of
from stages.data.steps import MAX_STEPS, AnyFilter
from stages.data.table import (
    DISPOSITIONS,
    DOCUMENTS,
    DocumentRow,
    content_hash,
    read_shard,
    row_writer,
    stream_shards,
    write_json,
    write_rows,
)
from stages.evaluation.eval_set import texts_of

if TYPE_CHECKING:
    from stages.data.curation.dispositions import Dispositions
    from stages.data.curation.filtering import FilterResults

VERSION = 1


class FilteredSource(Config):
    """The settings of one source that filtering uses; its documents are the input of the same name."""

    name: SourceName = Field(description="name of the source")
    kind: Kind = Field(description="kind of the documents")
    steps: tuple[AnyFilter, ...] = Field((), max_length=MAX_STEPS, description="curation steps, in order")


class FilterConfig(Config):
    sources: tuple[FilteredSource, ...] = Field(
        min_length=1, max_length=MOST_SOURCES, description="sources of the corpus"
    )
    curation: CurationSettings = Field(description="curation of all sources together")
    seed: Seed = Field(description="seed of the recipe")


def run(config: FilterConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal the documents that pass, by source, their MinHash signatures, a disposition for every input document, and
    the number of documents that each step edited.

    inputs[<source>]: acquired documents of each source of the config; inputs["items"]: evaluation items.
    Resumes after the last finished shard. Raises AtomError if counts do not balance.
    """
    from stages.data.curation import near_duplicates
    from stages.data.curation.dispositions import Dispositions

    shards, signature_number = _Shards(config, inputs, work), 0
    dispositions, first_ids = Dispositions(), dict[str, str]()
    edits, passed = {source.name: Counter[str]() for source in config.sources}, Counter[str]()

    def write_passing(source: FilteredSource) -> Iterator[list[int]]:
        """Writes each document that passes, and yields its signature."""
        with row_writer(out / "kept" / f"{source.name}.parquet", DOCUMENTS) as write:
            for shard, acquired in enumerate(shards.acquired(source)):
                results = shards.apply_steps(source, shard, acquired)
                edits[source.name].update(results["edits"])
                rows = _drop_exact_duplicates(source, acquired, results, dispositions, first_ids)
                for row, signature in zip(rows, shards.signatures(source, results["kept"], shard), strict=True):
                    if row is not None:
                        write(row)
                        passed[source.name] += 1
                        yield signature

    for n, source in enumerate(config.sources):
        settings = shards.minhash(source)
        if settings is None:
            for _ in write_passing(source):
                pass
        else:
            near_duplicates.write_signatures(out / "signatures", settings, signature_number, write_passing(source))
            signature_number += 1
        report.progress(n + 1, len(config.sources), "sources")
        report.note(f"{source.name}: {passed[source.name]} documents left after its steps and exact duplicates")
    write_rows(out / "dispositions.parquet", DISPOSITIONS, dispositions.close(passed))
    write_json(out / "edits.json", {name: dict(+counts) for name, counts in edits.items()})


def run_shard(config: FilterConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Runs the steps on one shard of every source, computes MinHash signatures, and caches both in `work`."""
    shards = _Shards(config, inputs, work)
    for source in config.sources:
        acquired = read_shard(shards.file(source), shard, config.curation.shards)
        shards.signatures(source, shards.apply_steps(source, shard, acquired)["kept"], shard)


class _Shards:
    """The operations on a single shard of a source; `work` caches each result."""

    def __init__(self, config: FilterConfig, inputs: Inputs, work: Path) -> None:
        from loguru import logger

        from stages.data.curation.decontamination import ContaminationIndex

        logger.disable("datatrove")  # it logs each of many small steps
        self.config, self.inputs, self.work = config, inputs, work
        self.index = ContaminationIndex(texts_of(inputs["items"]), config.curation.decontamination.ngram)

    def file(self, source: FilteredSource) -> Path:
        return self.inputs[source.name] / "documents.parquet"

    def acquired(self, source: FilteredSource) -> Iterator[list[DocumentRow]]:
        """The acquired documents of each shard."""
        return stream_shards(self.file(source), self.config.curation.shards)

    def minhash(self, source: FilteredSource) -> MinHash | None:
        """The MinHash settings for the source, or None if its kind is not deduplicated."""
        settings = self.config.curation.minhash
        return settings if settings is not None and source.kind in settings.kinds else None

    def apply_steps(self, source: FilteredSource, shard: int, acquired: list[DocumentRow]) -> FilterResults:
        """The results of the source's steps and of decontamination on a shard."""
        from stages.data.curation.filtering import filter_documents

        path = self._path("steps", source, shard)
        results: FilterResults = once(path, lambda: filter_documents(source.name, source.steps, acquired, self.index))
        return results

    def signatures(self, source: FilteredSource, kept: list[tuple[str, str]], shard: int) -> list[list[int]]:
        """The MinHash signatures of the kept (id, text); empty ones for a source without near-duplicate removal."""
        from stages.data.curation import near_duplicates

        settings = self.minhash(source)
        if settings is None:
            return [[]] * len(kept)
        seed, texts = seed_of("minhash", self.config.seed), [text for _, text in kept]
        computed: list[list[int]] = once(
            self._path("signatures", source, shard), lambda: near_duplicates.sign(texts, settings, seed)
        )
        return computed

    def _path(self, kind: str, source: FilteredSource, shard: int) -> Path:
        return self.work / f"{kind}-{source.name}-{shard:05d}-of-{self.config.curation.shards:05d}.json"


def _drop_exact_duplicates(
    source: FilteredSource,
    acquired: list[DocumentRow],
    results: FilterResults,
    dispositions: Dispositions,
    first_ids: dict[str, str],
) -> Iterator[DocumentRow | None]:
    """For each document of a shard that passes the steps: its row, or None if an earlier document has the same text.

    first_ids: the id of the first document of each SHA-256. datatrove's exact block hashes to 64 bits and does not name
    the kept document.
    """
    rows = {row["id"]: row for row in acquired}
    for row in acquired:
        dispositions.add(row)
    for removal in results["removed"]:
        dispositions.remove(**removal)
    for id, text in results["kept"]:
        digest = content_hash(text)
        if (kept_id := first_ids.setdefault(digest, id)) != id:
            dispositions.remove(id, "exact_duplicate", 1.0, 1.0, duplicate_of=kept_id)
            yield None
            continue
        dispositions.keep(id, None, digest)
        kept: DocumentRow = {**rows[id], "text": text, "content_hash": digest}
        if source.kind == "chat":
            kept["prompt_chars"] = prompt_chars(text)  # a step may have edited the text
        yield kept


def estimate(config: FilterConfig) -> Estimate:
    return Estimate(cpu_seconds=30.0, fixed=True)


STAGE = Stage(
    "filter", VERSION, FilterConfig, run, estimate=estimate, shards=lambda c: c.curation.shards, run_shard=run_shard
)
