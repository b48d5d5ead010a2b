"""Filter: the deny-list of the recipe, the steps of each source, secrets, then decontamination, part by part.

The order matters. Personal data is replaced before deduplication, so copies that differ only in an address are
duplicates. Contaminated documents are removed before duplicates, so the representative of a group of duplicates is
never removed afterwards. The steps run in one process for each part: a small corpus is not worth the start-up of
datatrove's executor, some seconds for each step. Memory holds some thousand documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Key, Line, Seed, SourceName, Text
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, PartCount, link_parts, part_file, seal_part, shards_of
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, identity, operational
from stages.data import estimates
from stages.data.acquire.licenses.expressions import Licenses
from stages.data.acquire.readers.base import FAILED_RULE, REFUSED_RULES, Failures
from stages.data.curate import deny_list
from stages.data.curate.alarms import Acknowledged, filter_losses, require_acknowledged
from stages.data.curate.denied import DENIED, PARENTS, PartOptOut, denied_columns, variants_of
from stages.data.curate.deny_list import DenyList
from stages.data.curate.filters.base import FilterFunction
from stages.data.curate.settings import CurationSettings, MinHash
from stages.data.curate.source_filter import Removed, SourceFilter, kept_disposition, removed_disposition
from stages.data.curate.steps import MAX_STEPS, AnyFilter, code_of
from stages.data.estimates import Size
from stages.formats.seeds import seed_of
from stages.formats.table import (
    DISPOSITIONS,
    DOCUMENTS,
    FAILED,
    GENERATED_DISPOSITIONS,
    MEASURES,
    DispositionRow,
    DocumentRow,
    Kind,
    content_hash,
    hash_columns,
    row_writer,
    stream_batches,
    stream_rows,
    write_json,
)
from stages.tasks import benchmarks
from stages.tasks.eval_set import texts_of

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ContaminationIndex

VERSION = 5


class FilteredSource(Config):
    """The settings of one source that filtering uses; its documents are the input of the same name."""

    name: SourceName
    """name of the source"""
    kind: Kind
    """kind of the documents"""
    steps: tuple[AnyFilter, ...] = Field((), max_length=MAX_STEPS)
    """curation steps, in order"""
    parts: PartCount = added(1)
    """parts of the source"""
    expected: Size | None = operational(None)
    """expected size of the source; null: unknown"""
    license_allow: Licenses = added(())
    """licenses of the documents that are kept; empty: all"""
    acknowledged_removals: Acknowledged = operational({})
    """by rule, the share of the source that it may remove"""
    pipeline: Key | None = added(None)
    """pipeline of the data recipe that the first steps are of; null: none"""
    generator: Line | None = added(None)
    """generator of the source's texts, which its dispositions name; null: none"""


class FilterConfig(Config):
    sources: tuple[FilteredSource, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    """sources of the corpus"""
    curation: CurationSettings
    """curation of all sources together"""
    seed: Seed
    """seed of the recipe"""
    notice: Text | None = added(None)
    """paragraph on the corpus for its cards; null: none"""

    def parts(self) -> list[tuple[FilteredSource, int]]:
        """Returns every part of every source, in order."""
        return [(source, part) for source in self.sources for part in range(source.parts)]


def run(config: FilterConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals the documents that pass, by source and part, and a disposition for every acquired document.

    Also sealed are the hashes of those documents, what steps measured of them, and the number of documents that each
    step edited. With a deny-list these are followed by the hashes of denied documents and the parents of kept ones, by
    part, and by the requests.

    The inputs are the acquired documents of each source under its name, the evaluation items under `items`, and what
    steps read, such as `classifier-<name>`. `curation.json` states the steps if a source names its pipeline, what the
    classifiers measured, and the notice.

    Resumes after the last sealed part. Raises AtomError if no document of any source is left, if many fail, or if a
    rule removes so large a share of a source that the recipe must acknowledge it.
    """
    inspect(config)
    # A missing deny-list and broken steps are found before the first document is read.
    maker, parts = _PartMaker(config, inputs, work), dict[str, list[Part]]()
    jobs = config.parts()
    for done, (source, number) in enumerate(jobs, start=1):
        parts.setdefault(source.name, []).append(maker.seal(source, number))
        report.progress(done, len(jobs), "parts")
    for name, source_parts in parts.items():
        link_parts(source_parts, out)
        _report_source(name, source_parts, report)
    # The alarm comes after all parts: a share is that of the whole source.
    _require_acknowledged(config, parts, report)
    if not any(part.facts["kept"] for source_parts in parts.values() for part in source_parts):
        raise AtomError("curation removed every document of every source; loosen the steps of the data recipe")
    if maker.deny_list is not None:
        requests = {"deny_list": config.curation.deny_list_sha256, "requests": maker.deny_list.requests()}
        write_json(out / "opt_out.json", requests)
    write_json(out / "edits.json", {name: _add_up(source_parts, "edits") for name, source_parts in parts.items()})
    if config.notice or any(source.pipeline for source in config.sources):
        write_json(out / "curation.json", _stated(config, inputs))


def run_shard(config: FilterConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`."""
    inspect(config)
    _PartMaker(config, inputs, work).seal(*config.parts()[shard])


def _stated(config: FilterConfig, inputs: Inputs) -> dict[str, Any]:
    """Returns the notice, the steps of each source with their settings, and what each classifier measured."""
    sources, classifiers = {}, dict[str, Any]()
    for source in config.sources:
        steps = [{"name": step.name, **identity(step)} for step in source.steps]
        sources[source.name] = {"pipeline": source.pipeline, "steps": steps}
        classifiers |= {node: inputs[node].json("meta.json") for step in source.steps for node in step.inputs}
    return {"notice": config.notice, "sources": sources, "classifiers": classifiers}


class _PartMaker:
    """Makes the parts of all sources; what they share is loaded when the first one is made."""

    def __init__(self, config: FilterConfig, inputs: Inputs, work: Path) -> None:
        self.config, self.inputs, self.work = config, inputs, work

    def seal(self, source: FilteredSource, number: int) -> Part:
        return seal_part(self.work, f"{source.name}-{number:05d}", partial(self._filter_part, source, number))

    @cached_property
    def _index(self) -> ContaminationIndex:
        from loguru import logger

        from stages.data.curate.decontamination import ContaminationIndex

        logger.disable("datatrove")  # it logs each of many small steps
        # Loaded with the first part that is made: a resumed run may need it no more.
        texts = texts_of(self.inputs["items"])
        if "benchmarks" in self.inputs:
            texts += benchmarks.texts_of(self.inputs["benchmarks"])
        return ContaminationIndex(texts, self.config.curation.decontamination.ngram)

    @cached_property
    def deny_list(self) -> DenyList | None:
        curation = self.config.curation
        return deny_list.read(curation.deny_list, curation.deny_list_sha256)

    @cached_property
    def _pipelines(self) -> list[list[FilterFunction]]:
        """The functions of the steps of each source, which may load a model; each pipeline once."""
        different = {repr(source.steps): source.steps for source in self.config.sources if source.steps}
        # A step with a model only removes, so no text is as it leaves it.
        return [[step.function() for step in steps if not step.inputs] for steps in different.values()]

    def _minhash(self, *sources: FilteredSource) -> MinHash | None:
        """Returns the MinHash settings for sources, or None if the kind of none is deduplicated."""
        settings = self.config.curation.minhash
        searched = settings is not None and any(source.kind in settings.kinds for source in sources)
        return settings if searched else None

    def _filter_part(self, source: FilteredSource, number: int, folder: Path) -> dict[str, Any]:
        """Writes the tables of a part, and returns its counts."""
        acquired, file = self.inputs[source.name], part_file(number)
        source_steps = [step.prepared(self.inputs, acquired / "documents" / file) for step in source.steps]
        steps = SourceFilter(source.name, source.kind, source_steps, self._index, source.license_allow)
        minhash = self._minhash(source)
        columns = hash_columns(_buckets(minhash))
        counts, removed = Counter[str](documents=0, bytes=0, kept=0), Counter[str]()
        disposition_columns = GENERATED_DISPOSITIONS if source.generator else DISPOSITIONS
        with (
            ExitStack() as stack,
            row_writer(folder / "kept" / source.name / file, DOCUMENTS) as write_kept,
            row_writer(folder / "hashes" / source.name / file, columns) as write_hashes,
            row_writer(folder / "dispositions" / source.name / file, disposition_columns) as write_row,
        ):

            def write_disposition(row: DispositionRow) -> None:
                write_row({**row, "generator": source.generator} if source.generator else row)

            opt_out = self._opt_out(stack, source, number, folder)
            if steps.measures:
                path, measure_columns = folder / MEASURES / source.name / file, {"id": "string", **steps.measures}
                write_measures = stack.enter_context(row_writer(path, measure_columns))
            for batch in stream_batches(acquired / "documents" / file, list(DOCUMENTS)):
                kept: list[DocumentRow] = []
                for row in batch.to_pylist():
                    # A request goes before every other rule, so that its copies are found whatever the steps would
                    # do.
                    result = (opt_out and opt_out.find(row)) or steps.apply(row)
                    # A content hash can name the text as the steps leave it.
                    if opt_out and not isinstance(result, Removed):
                        result = opt_out.find_edited(row, result, counts["kept"] + len(kept)) or result
                    if isinstance(result, Removed):
                        removed[result.rule] += 1
                        write_disposition(removed_disposition(row, result))
                    else:
                        kept.append(result)
                        write_kept(result)
                        if steps.measures:
                            write_measures({"id": row["id"], **steps.measured})
                        write_disposition(kept_disposition(row, result["content_hash"]))
                    counts.update(documents=1, bytes=len(row["text"].encode()))
                # Hashes are computed for a batch of texts at once, as MinHash works on arrays.
                for hashes in self._hashes([(row["text"], row["content_hash"]) for row in kept], minhash):
                    write_hashes(dict(zip(columns, hashes, strict=True)))
                if opt_out:
                    self._write_denied(opt_out)
                counts.update(kept=len(kept))
            # Failed steps are counted among the documents that reached them, so before the ones that acquire refused.
            steps.failures.require_few(counts["documents"])
            for row, rule in _failed_documents(acquired / "failed" / file):
                # The ids of refused documents are published as well.
                steps.require_public(row["id"])
                failed = (opt_out and opt_out.find_failed(row)) or Removed(rule, 0.0, 0.0)
                counts.update(documents=1)
                removed[failed.rule] += 1
                write_disposition(removed_disposition(row, failed))
        facts = {"removed": removed, "edits": +steps.edits, "failures": steps.failures.facts()}
        return {**counts, **facts}

    def _opt_out(self, stack: ExitStack, source: FilteredSource, number: int, folder: Path) -> PartOptOut | None:
        """Finds the denied documents of a part; None without a deny-list."""
        if self.deny_list is None:
            return None
        file, acquired = part_file(number), self.inputs[source.name]
        opt_out = PartOptOut(
            stack, self.deny_list, lambda row: variants_of(row, self._pipelines), acquired / "derived" / file
        )
        columns = denied_columns(_buckets(self._minhash(*self.config.sources)))
        opt_out.open(folder / DENIED / source.name / file, folder / PARENTS / source.name / file, columns)
        return opt_out

    def _write_denied(self, opt_out: PartOptOut) -> None:
        texts, opt_out.texts = opt_out.texts, []
        minhash = self._minhash(*self.config.sources)
        columns = denied_columns(_buckets(minhash))
        all_hashes = self._hashes([(text, content_hash(text)) for *_, text in texts], minhash)
        for (id, requests, url, _), hashes in zip(texts, all_hashes, strict=True):
            opt_out.write_denied(dict(zip(columns, [id, requests, url, *hashes], strict=True)))

    def _hashes(self, documents: list[tuple[str, str]], minhash: MinHash | None) -> Iterator[list[int | None]]:
        """Yields 128 bits of the SHA-256 of each (text, SHA-256), in halves, and with MinHash a hash of each bucket."""
        halves: list[list[int | None]] = [
            [int(digest[start : start + 16], 16) for start in (0, 16)] for _, digest in documents
        ]
        if minhash is None:
            yield from halves
            return
        from stages.data.curate.minhash import band_hashes

        texts, seed = [text for text, _ in documents], seed_of("minhash", self.config.seed)
        bands, short = band_hashes(texts, minhash, seed)
        for half, values, is_short in zip(halves, bands.tolist(), short.tolist(), strict=True):
            yield [*half, *([None] * len(values) if is_short else values)]


def _buckets(minhash: MinHash | None) -> int:
    return 0 if minhash is None else minhash.num_buckets


def _failed_documents(path: Path) -> Iterator[tuple[DocumentRow, str]]:
    """Yields the documents that could not be read or were refused, as documents with an empty text, and their rules."""
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
        # A reason without a kind is that of a document that could not be read.
        yield document, REFUSED_RULES.get(kind, FAILED_RULE) if separator else FAILED_RULE


def _require_acknowledged(config: FilterConfig, parts: dict[str, list[Part]], report: Report) -> None:
    losses = [
        loss
        for source in config.sources
        for loss in filter_losses(
            source.name,
            [step.name for step in source.steps],
            sum(part.facts["documents"] for part in parts[source.name]),
            _add_up(parts[source.name], "removed"),
        )
    ]
    acknowledged = {source.name: source.acknowledged_removals for source in config.sources}
    require_acknowledged(losses, config.curation.alarm_share, acknowledged, report)


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
    """Returns the sums of a fact that counts by name."""
    total = Counter[str]()
    for part in parts:
        total.update(part.facts[fact])
    return dict(total)


def inspect(config: FilterConfig) -> list[str]:
    """Returns the notes of all steps, each with its sources. Raises RecipeError for a step that cannot run."""
    notes: dict[str, list[str]] = {}
    for source in config.sources:
        for step in source.steps:
            if (note := step.inspect()) and source.name not in notes.setdefault(note, []):
                notes[note].append(source.name)
    return [f"{note} ({', '.join(sources)})" for note, sources in notes.items()]


def estimate(config: FilterConfig) -> Estimate:
    step_seconds = sum(
        step.seconds_per_mb * source.expected.bytes / 1e6
        for source in config.sources
        if source.expected is not None
        for step in source.steps
    )
    size = estimates.total(source.expected for source in config.sources)
    measured = {s.name: s.parts for s in config.sources if any(step.measures for step in s.steps)}
    estimated = estimates.estimate("filter", size, small=30.0, step_seconds=step_seconds)
    return replace(estimated, published=estimates.published(MEASURES, measured))


STAGE = Stage(
    "filter",
    VERSION,
    FilterConfig,
    run,
    estimate=estimate,
    inspect=inspect,
    code=lambda config: code_of(step for source in config.sources for step in source.steps),
    shards=lambda config: shards_of(source.parts for source in config.sources),
    run_shard=run_shard,
)
