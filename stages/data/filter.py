"""Filter: the steps of each source, then decontamination and exact duplicates over all; what is left goes to `curate`.

Order matters: personal data is replaced before duplicates are sought, so copies that differ in an address are found;
contaminated documents go before duplicates, so that a document that stays in place of others is itself kept.
Blocks are datatrove's, composed directly in one process a shard: the corpus of a demo is too small for an executor's
start-up of some seconds a step. Of all documents together only digests and dispositions are held in memory, of texts
those of one shard of one source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.errors import AtomError
from pipeline.stage import Config, Estimate, Inputs, Report, Stage
from pipeline.store import once
from stages.data.chat import prompt_chars
from stages.data.curation.settings import AnyStep, CurationSettings, Kind
from stages.data.items import texts_of
from stages.data.seeds import seed_of
from stages.data.table import DISPOSITIONS, DOCUMENTS, content_hash, read_shard, write_json, write_rows, writing

if TYPE_CHECKING:
    from datatrove.data import Document

    from stages.data.curation.decontaminate import ContaminationIndex
    from stages.data.curation.dispositions import Dispositions

VERSION = 1


class FilteredSource(Config):
    """What filtering needs to know of one source; its documents come with the input of the same name."""

    name: str
    kind: Kind
    steps: tuple[AnyStep, ...] = ()


class FilterConfig(Config):
    sources: tuple[FilteredSource, ...] = Field(min_length=1)
    curation: CurationSettings
    seed: int


def run(config: FilterConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal the documents that pass, by source, their MinHash signatures, a disposition for every input document, and
    how many documents each step edited.

    inputs[<source>]: acquired documents of each source of the config; inputs["items"]: evaluation items.
    Resumes after the last shard that was finished. Raises AtomError if counts do not balance.
    """
    from loguru import logger

    from stages.data.curation import dedup
    from stages.data.curation.dispositions import Dispositions

    logger.disable("datatrove")  # it logs each of many small steps
    dispositions, first = Dispositions(), dict[str, str]()
    edits: dict[str, Counter[str]] = {}
    passed: Counter[str] = Counter()
    signed = 0
    index = _index(config, inputs)
    for n, source in enumerate(config.sources):
        edits[source.name] = Counter()

        def passing(source: FilteredSource = source) -> Iterator[list[int]]:
            """Writes each document that passes, and gives its signature."""
            with writing(out / "kept" / f"{source.name}.parquet", DOCUMENTS) as write:
                for shard in range(config.curation.shards):
                    saved = _stepped(config, source, inputs, index, work, shard)
                    edits[source.name].update(saved["edits"])
                    signatures = _signed(config, source, saved["kept"], work, shard)
                    for row, signature in zip(
                        _decided(config, source, inputs, saved, shard, dispositions, first), signatures, strict=True
                    ):
                        if row is not None:
                            write(row)
                            passed[source.name] += 1
                            yield signature

        if _sought(config, source):
            assert config.curation.minhash is not None
            dedup.write_signatures(out / "signatures", config.curation.minhash, signed, passing())
            signed += 1
        else:
            for _ in passing():
                pass
        report.progress(n + 1, len(config.sources), "sources")
        report.note(f"{source.name}: {passed[source.name]} documents left after its steps and exact duplicates")
    write_rows(out / "dispositions.parquet", DISPOSITIONS, dispositions.close(passed))
    write_json(out / "edits.json", {name: dict(+counts) for name, counts in edits.items()})


def _decided(
    config: FilterConfig,
    source: FilteredSource,
    inputs: Inputs,
    saved: dict[str, Any],
    shard: int,
    dispositions: Dispositions,
    first: dict[str, str],
) -> Iterator[dict[str, Any] | None]:
    """For each document that the steps left of a shard: its row, or None if an earlier document has the same text.

    first: the id of the first document of each SHA-256. datatrove's exact block hashes to 64 bits and does not name the
    kept document.
    """
    rows = {row["id"]: row for row in _rows(config, source, inputs, shard)}
    for row in rows.values():
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


def run_shard(config: FilterConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """The steps of one shard of every source, and the MinHash signatures of what they leave, kept in `work`."""
    from loguru import logger

    logger.disable("datatrove")
    index = _index(config, inputs)
    for source in config.sources:
        saved = _stepped(config, source, inputs, index, work, shard)
        _signed(config, source, saved["kept"], work, shard)


def _index(config: FilterConfig, inputs: Inputs) -> ContaminationIndex:
    from stages.data.curation.decontaminate import ContaminationIndex

    return ContaminationIndex(texts_of(inputs["items"]), config.curation.decontamination.ngram)


def _rows(config: FilterConfig, source: FilteredSource, inputs: Inputs, shard: int) -> list[dict[str, Any]]:
    return read_shard(inputs[source.name] / "documents.parquet", shard, config.curation.shards)


def _sought(config: FilterConfig, source: FilteredSource) -> bool:
    """Whether near duplicates are sought among the source's documents."""
    return config.curation.minhash is not None and source.kind in config.curation.minhash.kinds


def _stepped(
    config: FilterConfig, source: FilteredSource, inputs: Inputs, index: ContaminationIndex, work: Path, shard: int
) -> dict[str, Any]:
    """The source's own steps and decontamination on one shard; the result is kept in `work`."""
    path = work / f"steps-{source.name}-{shard:05d}-of-{config.curation.shards:05d}.json"
    found: dict[str, Any] = once(path, lambda: _apply(source, _rows(config, source, inputs, shard), index))
    return found


def _signed(
    config: FilterConfig, source: FilteredSource, kept: list[tuple[str, str]], work: Path, shard: int
) -> list[list[int]]:
    """The MinHash signatures of the (id, text) that the steps left of a shard, kept in `work` as well; empty ones of a
    source in which no near duplicates are sought."""
    from stages.data.curation import dedup

    settings, shards = config.curation.minhash, config.curation.shards
    if settings is None or not _sought(config, source):
        return [[]] * len(kept)
    seed, texts = seed_of("minhash", config.seed), [text for _, text in kept]
    path = work / f"signatures-{source.name}-{shard:05d}-of-{shards:05d}.json"
    found: list[list[int]] = once(path, lambda: dedup.sign(texts, settings, seed))
    return found


def _apply(source: FilteredSource, rows: list[dict[str, Any]], index: ContaminationIndex) -> dict[str, Any]:
    from datatrove.data import Document

    from stages.data.curation.blocks import build
    from stages.data.curation.decontaminate import Decontaminate
    from stages.data.curation.measures import measured

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
