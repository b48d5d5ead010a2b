"""Filter: the steps of each source, then decontamination, part by part.

The order matters. Personal data is replaced before deduplication, so copies that differ only in an address are
duplicates. Contaminated documents are removed before duplicates, so the representative of a group of duplicates is
never removed afterwards. The steps run in one process for each part: a small corpus is not worth the start-up of
datatrove's executor, some seconds for each step. Memory holds some thousand documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Seed, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, PartCount, link_parts, part_file, seal_part, shards_of
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from stages.data import estimates
from stages.data.curation.dispositions import kept_disposition, removed_disposition
from stages.data.curation.failures import FAILED_RULE, Failures
from stages.data.curation.filtering import Removed, SourceFilter
from stages.data.curation.settings import CurationSettings, MinHash
from stages.data.estimates import Size
from stages.data.kinds import Kind
from stages.data.licenses.allow import Licenses
from stages.data.readers.base import REFUSED_RULES
from stages.data.seeds import seed_of
from stages.data.steps import MAX_STEPS, AnyFilter
from stages.data.table import (
    DISPOSITIONS,
    DOCUMENTS,
    FAILED,
    DocumentRow,
    content_hash,
    hash_columns,
    row_writer,
    stream_batches,
    stream_rows,
    write_json,
)
from stages.evaluation.eval_set import texts_of

if TYPE_CHECKING:
    from stages.data.curation.decontamination import ContaminationIndex

VERSION = 2


class FilteredSource(Config):
    """The settings of one source that filtering uses; its documents are the input of the same name."""

    name: SourceName = Field(description="name of the source")
    kind: Kind = Field(description="kind of the documents")
    steps: tuple[AnyFilter, ...] = Field((), max_length=MAX_STEPS, description="curation steps, in order")
    parts: PartCount = added(1, "parts of the source")
    expected: Size | None = operational(None, "expected size of the source; null: unknown")
    license_allow: Licenses = added((), "licenses of the documents that are kept; empty: all")


class FilterConfig(Config):
    sources: tuple[FilteredSource, ...] = Field(
        min_length=1, max_length=MOST_SOURCES, description="sources of the corpus"
    )
    curation: CurationSettings = Field(description="curation of all sources together")
    seed: Seed = Field(description="seed of the recipe")

    def parts(self) -> list[tuple[FilteredSource, int]]:
        """Every part of every source, in order."""
        return [(source, part) for source in self.sources for part in range(source.parts)]


def run(config: FilterConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal the documents that pass, by source and part, their hashes, a disposition for every acquired document, and
    the number of documents that each step edited.

    inputs[<source>]: acquired documents of each source of the config; inputs["items"]: evaluation items;
    inputs["classifier-<name>"]: each classifier that a step uses.
    Resumes after the last sealed part. Raises AtomError if no document of any source is left, or if many fail.
    """
    maker, parts = _PartMaker(config, inputs, work), dict[str, list[Part]]()
    jobs = config.parts()
    for done, (source, number) in enumerate(jobs, start=1):
        parts.setdefault(source.name, []).append(maker.seal(source, number))
        report.progress(done, len(jobs), "parts")
    for name, source_parts in parts.items():
        link_parts(source_parts, out)
        _report_source(name, source_parts, report)
    if not any(part.facts["kept"] for source_parts in parts.values() for part in source_parts):
        raise AtomError("curation removed every document of every source; loosen the steps of the data recipe")
    write_json(out / "edits.json", {name: _add_up(source_parts, "edits") for name, source_parts in parts.items()})


def run_shard(config: FilterConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`."""
    _PartMaker(config, inputs, work).seal(*config.parts()[shard])


class _PartMaker:
    """Makes the parts of all sources; what they share is loaded when the first one is made."""

    def __init__(self, config: FilterConfig, inputs: Inputs, work: Path) -> None:
        self.config, self.inputs, self.work = config, inputs, work

    def seal(self, source: FilteredSource, number: int) -> Part:
        return seal_part(self.work, f"{source.name}-{number:05d}", partial(self._filter_part, source, number))

    @cached_property
    def _index(self) -> ContaminationIndex:
        from loguru import logger

        from stages.data.curation.decontamination import ContaminationIndex

        logger.disable("datatrove")  # it logs each of many small steps
        return ContaminationIndex(texts_of(self.inputs["items"]), self.config.curation.decontamination.ngram)

    def _minhash(self, source: FilteredSource) -> MinHash | None:
        """The MinHash settings for the source, or None if its kind is not deduplicated."""
        settings = self.config.curation.minhash
        return settings if settings is not None and source.kind in settings.kinds else None

    def _filter_part(self, source: FilteredSource, number: int, folder: Path) -> dict[str, Any]:
        """Writes the three tables of a part, and returns its counts."""
        acquired, file = self.inputs[source.name], part_file(number)
        source_steps = [step.with_inputs(self.inputs) for step in source.steps]
        steps = SourceFilter(source.name, source.kind, source_steps, self._index, source.license_allow)
        minhash = self._minhash(source)
        columns = hash_columns(0 if minhash is None else minhash.num_buckets)
        counts, removed = Counter[str](documents=0, bytes=0, kept=0), Counter[str]()
        with (
            row_writer(folder / "kept" / source.name / file, DOCUMENTS) as write_kept,
            row_writer(folder / "hashes" / source.name / file, columns) as write_hashes,
            row_writer(folder / "dispositions" / source.name / file, DISPOSITIONS) as write_disposition,
        ):
            for batch in stream_batches(acquired / "documents" / file, list(DOCUMENTS)):
                kept: list[DocumentRow] = []
                for row in batch.to_pylist():
                    result = steps.apply(row)
                    if isinstance(result, Removed):
                        removed[result.rule] += 1
                        write_disposition(removed_disposition(row, result))
                    else:
                        kept.append(result)
                        write_kept(result)
                        write_disposition(kept_disposition(row, result["content_hash"]))
                    counts.update(documents=1, bytes=len(row["text"].encode()))
                for hashes in self._hashes(kept, minhash):
                    write_hashes(dict(zip(columns, hashes, strict=True)))
                counts.update(kept=len(kept))
            steps.failures.require_few(counts["documents"])
            for row, rule in _failed_documents(acquired / "failed" / file):
                counts.update(documents=1)
                removed[rule] += 1
                write_disposition(removed_disposition(row, Removed(rule, 0.0, 0.0)))
        facts = {"removed": removed, "edits": +steps.edits, "failures": steps.failures.facts()}
        return {**counts, **facts}

    def _hashes(self, documents: list[DocumentRow], minhash: MinHash | None) -> Iterator[list[int | None]]:
        """For each document the halves of 128 bits of its SHA-256, and with MinHash a hash of each bucket."""
        halves: list[list[int | None]] = [
            [int(row["content_hash"][start : start + 16], 16) for start in (0, 16)] for row in documents
        ]
        if minhash is None:
            yield from halves
            return
        from stages.data.curation.near_duplicates import band_hashes

        texts, seed = [row["text"] for row in documents], seed_of("minhash", self.config.seed)
        bands, short = band_hashes(texts, minhash, seed)
        for half, values, is_short in zip(halves, bands.tolist(), short.tolist(), strict=True):
            yield [*half, *([None] * len(values) if is_short else values)]


def _failed_documents(path: Path) -> Iterator[tuple[DocumentRow, str]]:
    """The documents that could not be read or were refused, as documents with an empty text, and their rules."""
    for row in stream_rows(path, list(FAILED)):
        document: DocumentRow = {
            "id": row["id"],
            "text": "",
            "source": row["source"],
            "license": row["license"],
            "origin": "",
            "content_hash": content_hash(""),
            "prompt_chars": 0,
        }
        kind, separator, _ = row["reason"].partition(": ")
        yield document, REFUSED_RULES.get(kind, FAILED_RULE) if separator else FAILED_RULE


def _report_source(name: str, parts: list[Part], report: Report) -> None:
    documents, kept = (sum(part.facts[fact] for part in parts) for fact in ("documents", "kept"))
    removed = Counter(_add_up(parts, "removed"))
    rules = ", ".join(f"{rule} {count}" for rule, count in removed.most_common())
    report.note(f"{name}: {kept} of {documents} documents pass; removed: {rules or 'none'}")
    failures = Failures.joined(part.facts["failures"] for part in parts)
    if failures.count:
        report.note(f"{name}: failed in its steps, and removed: {failures}")
    if documents and not kept:
        report.note(f"curation removed all documents of {name}: a phase whose mix has it has nothing to read from it")


def _add_up(parts: list[Part], fact: str) -> dict[str, int]:
    """The sums of a fact that counts by name."""
    total = Counter[str]()
    for part in parts:
        total.update(part.facts[fact])
    return dict(total)


def estimate(config: FilterConfig) -> Estimate:
    step_seconds = sum(
        estimates.STEP_SECONDS.get(step.step, 0.0) * source.expected.bytes / 1e6
        for source in config.sources
        if source.expected is not None
        for step in source.steps
    )
    size = estimates.total(source.expected for source in config.sources)
    return estimates.estimate("filter", size, small=30.0, step_seconds=step_seconds)


STAGE = Stage(
    "filter",
    VERSION,
    FilterConfig,
    run,
    estimate=estimate,
    shards=lambda config: shards_of(source.parts for source in config.sources),
    run_shard=run_shard,
)
