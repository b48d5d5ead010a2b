"""Curate: the steps of each source, then decontamination and deduplication over all, then the held-out split.

Order matters: personal data is replaced before duplicates are sought, so copies that differ in an address are found;
contaminated documents go before duplicates, so that a document that stays in place of others is itself kept.
Blocks are datatrove's, composed directly in one process a source: the corpus of a demo is too small for an executor's
start-up of some seconds a step.
"""

from __future__ import annotations

import shutil
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
from stages.data.table import DISPOSITIONS, KEPT, content_hash, read_shard, read_table, write_json, write_rows

if TYPE_CHECKING:
    from datatrove.data import Document

    from stages.data.curation.decontaminate import ContaminationIndex

VERSION = 1


class CuratedSource(Config):
    """What curation needs to know of one source; its documents come with the input of the same name."""

    name: str
    kind: Kind
    heldout: float = Field(ge=0, lt=1)
    steps: tuple[AnyStep, ...] = ()


class CurateConfig(Config):
    sources: tuple[CuratedSource, ...] = Field(min_length=1)
    curation: CurationSettings
    seed: int


def run(config: CurateConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal kept documents by source, one disposition for every input document, and a summary.

    inputs[<source>]: acquired documents of each source of the config; inputs["items"]: evaluation items.
    Resumes after the last shard whose steps were finished. Raises AtomError if counts do not balance.
    """
    from datatrove.data import Document
    from loguru import logger

    from stages.data.curation import dedup
    from stages.data.curation.decontaminate import ContaminationIndex
    from stages.data.curation.dispositions import Dispositions, summarise

    logger.disable("datatrove")  # it logs each of many small steps
    index = ContaminationIndex(texts_of(inputs["items"]), config.curation.decontamination.ngram)
    dispositions = Dispositions()
    acquired: dict[str, dict[str, Any]] = {}
    documents: dict[str, list[Document]] = {}
    signatures: dict[str, list[int]] = {}
    edits: dict[str, dict[str, int]] = {}
    for n, source in enumerate(config.sources):
        rows = read_table(inputs[source.name] / "documents.parquet").to_pylist()
        for row in rows:
            dispositions.enter(row)
            acquired[row["id"]] = row
        documents[source.name], counts = [], Counter[str]()
        for shard in range(config.curation.shards):
            saved = _stepped(config, source, inputs, index, work, shard)
            for removal in saved["removed"]:
                dispositions.remove(**removal)
            documents[source.name] += [Document(text=text, id=id) for id, text in saved["kept"]]
            signed = _signed(config, source, saved["kept"], work, shard)
            signatures |= {text: s for (_, text), s in zip(saved["kept"], signed, strict=True) if s}
            counts.update(saved["edits"])
        edits[source.name] = dict(counts)
        report.progress(n + 1, len(config.sources) + 2, "sources")
        report.note(f"{source.name}: {len(documents[source.name])} of {len(rows)} documents left after its steps")

    documents = dedup.exact(documents, dispositions)
    if config.curation.minhash is not None:
        folder = work / "minhash"
        shutil.rmtree(folder, ignore_errors=True)
        kinds = {s.name for s in config.sources if s.kind in config.curation.minhash.kinds}
        some = {name: docs for name, docs in documents.items() if name in kinds}
        if any(some.values()):
            seed = seed_of("minhash", config.seed)
            documents.update(dedup.near(some, signatures, config.curation.minhash, seed, folder, dispositions))
    report.progress(len(config.sources) + 1, len(config.sources) + 2, "sources")

    written: Counter[str] = Counter()
    for source in config.sources:
        kept = [_kept(doc, acquired[doc.id], source) for doc in documents[source.name]]
        for row in kept:
            dispositions.keep(row["id"], row["split"], row["content_hash"])
        write_rows(out / "kept" / f"{source.name}.parquet", KEPT, kept)
        written[source.name] = len(kept)
    rows = dispositions.close(written)
    write_rows(out / "dispositions.parquet", DISPOSITIONS, rows)
    summary = summarise(rows, edits)
    write_json(out / "summary.json", summary)
    report.progress(len(config.sources) + 2, len(config.sources) + 2, "sources")
    for name, part in summary["sources"].items():
        removed = ", ".join(f"{rule} {n}" for rule, n in part["removed"].most_common())
        report.note(f"{name}: {part['documents_in']} in, {part['kept'].total()} kept; removed: {removed or 'none'}")


def _kept(doc: Document, row: dict[str, Any], source: CuratedSource) -> dict[str, Any]:
    digest = content_hash(doc.text)
    split = "heldout" if int(digest[:16], 16) < source.heldout * 2**64 else "train"
    row = {**row, "text": doc.text, "content_hash": digest, "split": split}
    return {**row, "prompt_chars": prompt_chars(doc.text)} if source.kind == "chat" else row  # a step may edit it


def run_shard(config: CurateConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """The steps of one shard of every source, and the MinHash signatures of what they leave, kept in `work`."""
    from loguru import logger

    from stages.data.curation.decontaminate import ContaminationIndex

    logger.disable("datatrove")
    index = ContaminationIndex(texts_of(inputs["items"]), config.curation.decontamination.ngram)
    for source in config.sources:
        saved = _stepped(config, source, inputs, index, work, shard)
        _signed(config, source, saved["kept"], work, shard)


def _stepped(
    config: CurateConfig, source: CuratedSource, inputs: Inputs, index: ContaminationIndex, work: Path, shard: int
) -> dict[str, Any]:
    """The source's own steps and decontamination on one shard; the result is kept in `work`."""
    shards = config.curation.shards
    path = work / f"steps-{source.name}-{shard:05d}-of-{shards:05d}.json"
    documents = inputs[source.name] / "documents.parquet"
    found: dict[str, Any] = once(path, lambda: _apply(source, read_shard(documents, shard, shards), index))
    return found


def _signed(
    config: CurateConfig, source: CuratedSource, kept: list[tuple[str, str]], work: Path, shard: int
) -> list[list[int]]:
    """The MinHash signatures of the (id, text) that the steps left of a shard, kept in `work` as well; empty ones of a
    source in which no near duplicates are sought."""
    from stages.data.curation import dedup

    settings, shards = config.curation.minhash, config.curation.shards
    if settings is None or source.kind not in settings.kinds:
        return [[]] * len(kept)
    seed, texts = seed_of("minhash", config.seed), [text for _, text in kept]
    path = work / f"signatures-{source.name}-{shard:05d}-of-{shards:05d}.json"
    found: list[list[int]] = once(path, lambda: dedup.sign(texts, settings, seed))
    return found


def _apply(source: CuratedSource, rows: list[dict[str, Any]], index: ContaminationIndex) -> dict[str, Any]:
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


def estimate(config: CurateConfig) -> Estimate:
    return Estimate(cpu_seconds=30.0)


STAGE = Stage(
    "curate", VERSION, CurateConfig, run, estimate=estimate, shards=lambda c: c.curation.shards, run_shard=run_shard
)
