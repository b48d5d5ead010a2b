"""Filter: the steps of each source, then decontamination and exact duplicates over all; what is left goes to `curate`.

Order matters: personal data is replaced before duplicates are sought, so copies that differ in an address are found;
contaminated documents go before duplicates, so that a document that stays in place of others is itself kept.
Blocks are datatrove's, composed directly in one process a shard: the corpus of a demo is too small for an executor's
start-up of some seconds a step. Of all documents together only digests and dispositions are held in memory, of texts
those of one shard and of one row group of what is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Seed, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from pipeline.core.store import once
from stages.data.chat import prompt_chars
from stages.data.filters.settings import MOST_STEPS, AnyStep, CurationSettings, Kind, MinHash
from stages.data.seeds import seed_of
from stages.data.table import (
    DISPOSITIONS,
    DOCUMENTS,
    content_hash,
    read_shard,
    stream_shards,
    write_json,
    write_rows,
    writing,
)
from stages.evaluation.eval_set import texts_of

if TYPE_CHECKING:
    from datatrove.data import Document

    from stages.data.filters.decontaminate import ContaminationIndex
    from stages.data.filters.dispositions import Dispositions

VERSION = 1


class FilteredSource(Config):
    """What filtering needs to know of one source; its documents come with the input of the same name."""

    name: SourceName
    kind: Kind
    steps: tuple[AnyStep, ...] = Field((), max_length=MOST_STEPS)


class FilterConfig(Config):
    sources: tuple[FilteredSource, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    curation: CurationSettings
    seed: Seed


def run(config: FilterConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal the documents that pass, by source, their MinHash signatures, a disposition for every input document, and
    how many documents each step edited.

    inputs[<source>]: acquired documents of each source of the config; inputs["items"]: evaluation items.
    Resumes after the last shard that was finished. Raises AtomError if counts do not balance.
    """
    from stages.data.filters import near_duplicates
    from stages.data.filters.dispositions import Dispositions

    shards, signed = _Shards(config, inputs, work), 0
    dispositions, first = Dispositions(), dict[str, str]()
    edits, passed = {source.name: Counter[str]() for source in config.sources}, Counter[str]()

    def passing(source: FilteredSource) -> Iterator[list[int]]:
        """Writes each document that passes, and gives its signature."""
        with writing(out / "kept" / f"{source.name}.parquet", DOCUMENTS) as write:
            for shard, acquired in enumerate(shards.all(source)):
                saved = shards.stepped(source, shard, acquired)
                edits[source.name].update(saved["edits"])
                rows = _decided(source, acquired, saved, dispositions, first)
                for row, signature in zip(rows, shards.signed(source, saved["kept"], shard), strict=True):
                    if row is not None:
                        write(row)
                        passed[source.name] += 1
                        yield signature

    for n, source in enumerate(config.sources):
        settings = shards.minhash(source)
        if settings is None:
            for _ in passing(source):
                pass
        else:
            near_duplicates.write_signatures(out / "signatures", settings, signed, passing(source))
            signed += 1
        report.progress(n + 1, len(config.sources), "sources")
        report.note(f"{source.name}: {passed[source.name]} documents left after its steps and exact duplicates")
    write_rows(out / "dispositions.parquet", DISPOSITIONS, dispositions.close(passed))
    write_json(out / "edits.json", {name: dict(+counts) for name, counts in edits.items()})


def run_shard(config: FilterConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """The steps of one shard of every source, and the MinHash signatures of what they leave, kept in `work`."""
    shards = _Shards(config, inputs, work)
    for source in config.sources:
        acquired = read_shard(shards.file(source), shard, config.curation.shards)
        shards.signed(source, shards.stepped(source, shard, acquired)["kept"], shard)


class _Shards:
    """What can be done with a shard of a source by itself, each result being kept in `work`."""

    def __init__(self, config: FilterConfig, inputs: Inputs, work: Path) -> None:
        from loguru import logger

        from stages.data.filters.decontaminate import ContaminationIndex

        logger.disable("datatrove")  # it logs each of many small steps
        self.config, self.inputs, self.work = config, inputs, work
        self.index = ContaminationIndex(texts_of(inputs["items"]), config.curation.decontamination.ngram)

    def file(self, source: FilteredSource) -> Path:
        return self.inputs[source.name] / "documents.parquet"

    def all(self, source: FilteredSource) -> Iterator[list[dict[str, Any]]]:
        """The documents of each shard as acquired."""
        return stream_shards(self.file(source), self.config.curation.shards)

    def minhash(self, source: FilteredSource) -> MinHash | None:
        """How near duplicates are sought among the source's documents, if they are."""
        settings = self.config.curation.minhash
        return settings if settings is not None and source.kind in settings.kinds else None

    def stepped(self, source: FilteredSource, shard: int, acquired: list[dict[str, Any]]) -> dict[str, Any]:
        """What the source's own steps and decontamination make of a shard."""
        path = self._path("steps", source, shard)
        found: dict[str, Any] = once(path, lambda: _apply(source, acquired, self.index))
        return found

    def signed(self, source: FilteredSource, kept: list[tuple[str, str]], shard: int) -> list[list[int]]:
        """The MinHash signatures of the (id, text) that the steps left; empty ones where none are needed."""
        from stages.data.filters import near_duplicates

        settings = self.minhash(source)
        if settings is None:
            return [[]] * len(kept)
        seed, texts = seed_of("minhash", self.config.seed), [text for _, text in kept]
        found: list[list[int]] = once(
            self._path("signatures", source, shard), lambda: near_duplicates.sign(texts, settings, seed)
        )
        return found

    def _path(self, what: str, source: FilteredSource, shard: int) -> Path:
        return self.work / f"{what}-{source.name}-{shard:05d}-of-{self.config.curation.shards:05d}.json"


def _decided(
    source: FilteredSource,
    acquired: list[dict[str, Any]],
    saved: dict[str, Any],
    dispositions: Dispositions,
    first: dict[str, str],
) -> Iterator[dict[str, Any] | None]:
    """For each document that the steps left of a shard: its row, or None if an earlier document has the same text.

    first: the id of the first document of each SHA-256. datatrove's exact block hashes to 64 bits and does not name the
    kept document.
    """
    rows = {row["id"]: row for row in acquired}
    for row in acquired:
        dispositions.enter(row)
    for removal in saved["removed"]:
        dispositions.remove(**removal)
    for id, text in saved["kept"]:
        digest = content_hash(text)
        if (kept := first.setdefault(digest, id)) != id:
            dispositions.remove(id, "exact_duplicate", 1.0, 1.0, duplicate_of=kept)
            yield None
            continue
        dispositions.keep(id, None, digest)
        row = {**rows[id], "text": text, "content_hash": digest}
        yield {**row, "prompt_chars": prompt_chars(text)} if source.kind == "chat" else row  # a step may edit it


def _apply(source: FilteredSource, rows: list[dict[str, Any]], index: ContaminationIndex) -> dict[str, Any]:
    from datatrove.data import Document

    from stages.data.filters.decontaminate import Decontaminate
    from stages.data.filters.filter_scores import measured
    from stages.data.filters.filters import build

    removed: list[dict[str, Any]] = []
    edits: Counter[str] = Counter()

    class Removals:
        """Where datatrove would write excluded documents: turns the block's reason into a disposition."""

        def __init__(self, step: str, block: Any) -> None:
            self.step, self.block = step, block

        def __enter__(self) -> Removals:
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def write(self, doc: Document, rank: int = 0) -> None:
            reason = doc.metadata.get("filter_reason", "score")
            value, threshold = measured(self.step, self.block, reason, doc)
            rule = f"{self.step}/{reason}"
            removed.append({"id": doc.id, "rule": rule, "value": value, "threshold": threshold})

    class Matches(Removals):
        def write(self, doc: Document, rank: int = 0) -> None:
            found = {"value": doc.metadata["match_words"], "threshold": index.ngram, "match": doc.metadata["match"]}
            removed.append({"id": doc.id, "rule": "decontamination", **found})

    def before(data: Iterator[Document]) -> Iterator[Document]:
        for doc in data:
            doc.metadata["before"] = doc.text
            yield doc

    def after(data: Iterator[Document], step: str) -> Iterator[Document]:
        for doc in data:
            edits[step] += doc.text != doc.metadata["before"]
            yield doc

    stream: Iterator[Document] = (Document(text=row["text"], id=row["id"]) for row in rows)
    for step in source.steps:
        block: Any = build(step)
        if hasattr(block, "exclusion_writer"):
            block.exclusion_writer = Removals(step.step, block)
        stream = after(block.run(before(stream)), step.step)
    last = Decontaminate(index)
    last.exclusion_writer = Matches("decontamination", last)
    kept = [(doc.id, doc.text) for doc in last.run(stream)]
    if len(kept) + len(removed) != len(rows):
        raise AtomError(
            f"source {source.name}: {len(rows)} documents went in, {len(kept)} came out, {len(removed)} were removed; "
            f"a step loses documents without saying so"
        )
    return {"kept": kept, "removed": removed, "edits": dict(+edits)}


def estimate(config: FilterConfig) -> Estimate:
    return Estimate(cpu_seconds=30.0, fixed=True)


STAGE = Stage(
    "filter", VERSION, FilterConfig, run, estimate=estimate, shards=lambda c: c.curation.shards, run_shard=run_shard
)
