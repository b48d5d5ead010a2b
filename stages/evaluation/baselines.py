"""Stage `baselines`: what simple models need for the held-out bytes that every model of the release was scored on.

    atom run atom-tiny --only baselines

A byte n-gram model, the frequencies of single bytes, and `xz` know the training text of a source, and encode its
held-out documents: the same documents and the same bytes as each model, which reads a document up to its context. This
is the best case of a baseline, since the models learn all sources at once. Of a large source the baselines know a
sample, whose size the report states.

Beside them stands the overlap: the share of the scored bytes that lie in 50 bytes which the training split has as well.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName
from pipeline.core.parts import Part, PartCount, seal_part, shards_of
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from stages.confidence import ratio
from stages.data import estimates
from stages.data.estimates import Size
from stages.evaluation.bits_per_byte import DOCUMENT_SCORES, DocumentScore, HeldoutLimit, heldout_documents
from stages.evaluation.ngram import BOUNDARY, KneserNey, Order
from stages.evaluation.scores import BaselineReport, KnownText, Overlap, SourceBaselines
from stages.formats.table import (
    Double,
    Int64,
    String,
    columns_of,
    part_files,
    read_table,
    sources_of,
    stream_batches,
    write_json,
    write_rows,
)

if TYPE_CHECKING:
    import numpy as np

    Hashes = np.ndarray[Any, np.dtype[np.uint64]]
    Mask = np.ndarray[Any, np.dtype[np.bool_]]

VERSION = 3
ROLE = "evaluate-"
# Bytes of a match between held-out and training text.
WINDOW = 50
# An odd multiplier of the rolling hash, modulo 2^64 (Knuth's, for 64 bits).
MULTIPLIER = 6364136223846793005
# Bytes of training text that are hashed at once, in about 64 bytes of memory each.
BLOCK = 2**21
SAMPLE = {"text": "string"}


class BaselineScore(TypedDict):
    """The bits that the models of bytes need for the scored part of a document."""

    source: String
    """name of the source"""
    id: String
    """id of the document"""
    bytes: Int64
    """bytes of the scored part; models with different contexts score different parts"""
    unigram_bits: Double
    """minus log2 of its probability by the frequencies of single bytes"""
    ngram_bits: Double
    """minus log2 of its probability by the n-gram model"""


BASELINE_SCORES = columns_of(BaselineScore)
# Of a held-out document the bytes before the scored part, and those from there on.
Texts = dict[str, tuple[bytes, bytes]]


class BaselinesSection(Config):
    """Baselines beside bits per byte, which know the training text of a source."""

    order: Order = 8
    """bytes of an n-gram: the predicted one and its context"""
    training_bytes: Annotated[int, Range(2**10, 2**30, "xz takes 11 times as much memory")] = 2**25
    """training text of a source that the baselines know, about; a larger source gives a sample by content hash"""


class BaselinesConfig(BaselinesSection):
    """The settings, and the held-out documents."""

    heldout_documents: HeldoutLimit
    """maximum number of held-out documents per source"""
    parts: Annotated[dict[SourceName, PartCount], Field(max_length=MOST_SOURCES)] = operational({})
    """parts of each source"""
    expected: Size | None = operational(None)
    """size of the corpus, for `atom plan` alone; null: unknown"""


def run(config: BaselinesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `baselines.parquet`, one row for each scored part of a document, and `report.json`.

    Resumes after the last part of the training text. One pass over this text takes 0.03 core seconds a MB, and memory
    for the hashes of the held-out text, 9 bytes a byte. Then the sample of one source at a time is in memory; xz takes
    11 bytes a byte of it and one second for about 1.5 MB, twice.
    """
    import numpy as np

    kept = inputs["dedup"] / "kept"
    parts = [(source, number) for source in sources_of(kept) for number in range(len(part_files(kept, source)))]
    sealed: dict[str, list[Part]] = {}
    for done, (source, number) in enumerate(parts, 1):
        sealed.setdefault(source, []).append(_search_part(config, inputs, work, source, number))
        report.progress(done, len(parts), "parts")

    models, texts = _documents(inputs), _texts(config, inputs)
    matched = np.logical_or.reduce([np.load(part.folder / "matched.npy") for rows in sealed.values() for part in rows])
    repeated = np.load(_windows(config, inputs, work).folder / "windows.npy")[matched]
    rows: list[BaselineScore] = []
    xz: dict[str, dict[str, int]] = {model: {} for model in models}
    training: dict[str, KnownText] = {}
    overlap: dict[str, Overlap] = {}
    for source in sorted({row["source"] for documents in models.values() for row in documents}):
        known = [text for part in sealed[source] for text in _sample(part)]
        size = sum(part.facts["bytes"] for part in sealed[source])
        training[source] = {"documents": len(known), "bytes": sum(map(len, known)), "all_bytes": size}
        cuts = {
            model: tuple((row["id"], row["bytes"]) for row in documents if row["source"] == source)
            for model, documents in models.items()
        }
        distinct = sorted({cut for scored in cuts.values() for cut in scored})
        rows += _byte_models(config.order, source, known, texts, distinct)
        # Models with one context have the same cuts, which are compressed once.
        bits = {
            scored: xz_bits(known, [(texts[id][0], _cut(texts, id, size)) for id, size in scored])
            for scored in set(cuts.values())
        }
        for model, scored in cuts.items():
            xz[model][source] = bits[scored]
        # A dictionary keeps the last cut of each document, which is the longest.
        longest = [_cut(texts, *cut) for cut in dict(distinct).items()]
        covered, size = sum(covered_bytes(text, repeated) for text in longest), sum(map(len, longest))
        overlap[source] = {"value": covered / size, "bytes": size}
    write_rows(out / "baselines.parquet", BASELINE_SCORES, rows)
    body: BaselineReport = {
        "order": config.order,
        "models": {model: summary(documents, rows, xz[model]) for model, documents in models.items()},
        "training": training,
        "overlap": overlap,
    }
    write_json(out / "report.json", body)
    for source, row in overlap.items():
        report.note(f"{source}: {row['value']:.1%} of the scored bytes are in the training text as well")


def run_shard(config: BaselinesConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Searches one part of the kept documents."""
    parts = [(source, number) for source, count in sorted(config.parts.items()) for number in range(count)]
    _search_part(config, inputs, work, *parts[shard])


def summary(
    documents: Sequence[DocumentScore], rows: Sequence[BaselineScore], xz: Mapping[str, int]
) -> dict[str, SourceBaselines]:
    """Returns the baselines of one model by source, from the tables and the bits of xz alone.

    Args:
        documents: The model's scored documents.
        rows: The baselines' scores of all documents.
        xz: Bits that xz needs for the model's documents, by source.
    """
    scores = {(row["id"], row["bytes"]): row for row in rows}
    figures: dict[str, SourceBaselines] = {}
    for source, bits in sorted(xz.items()):
        pairs = [(row, scores[row["id"], row["bytes"]]) for row in documents if row["source"] == source]
        works = [row["work"] for row, _ in pairs]
        figures[source] = {
            "xz": {"value": bits / sum(row["bytes"] for row, _ in pairs), "bits": bits},
            "ngram": ratio([(score["ngram_bits"], score["bytes"]) for _, score in pairs], works=works),
            "unigram": ratio([(score["unigram_bits"], score["bytes"]) for _, score in pairs], works=works),
            # Paired by document, so that what makes a document hard for both cancels.
            "less_ngram": ratio(
                [(row["nll_bits"] - score["ngram_bits"], row["bytes"]) for row, score in pairs], works=works
            ),
        }
    return figures


def xz_bits(known: Iterable[bytes], texts: Iterable[tuple[bytes, bytes]]) -> int:
    """Returns the bits by which texts lengthen the xz stream of what is known, in whose window all of it is.

    Args:
        known: The training text.
        texts: Of each document the question, which is known too, and the text after it.
    """
    pairs = list(texts)
    training = b"".join(known)
    before = training + b"".join(question for question, _ in pairs)
    together = training + b"".join(question + text for question, text in pairs)
    settings = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(2**12, len(together))}
    sizes = [len(lzma.compress(text, lzma.FORMAT_RAW, filters=[settings])) for text in (before, together)]
    return 8 * (sizes[1] - sizes[0])


def window_hashes(text: bytes) -> Hashes:
    """Returns a 64-bit hash of every WINDOW successive bytes of a text."""
    import numpy as np

    codes = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(len(codes), MULTIPLIER, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers)])
    # The sum over a window, divided by the power of its first byte: the same wherever the window is.
    inverses = np.cumprod(np.full(max(0, len(sums) - WINDOW), pow(MULTIPLIER, -1, 2**64), np.uint64))
    hashes: Hashes = (sums[WINDOW:] - sums[:-WINDOW]) * inverses
    return hashes


def covered_bytes(text: bytes, matched: Hashes) -> int:
    """Returns the number of bytes of a text that lie in a window whose hash is among `matched`."""
    import numpy as np

    starts = np.flatnonzero(np.isin(window_hashes(text), matched))
    steps = np.zeros(len(text) + 1, np.int64)
    steps[starts] += 1
    steps[starts + WINDOW] -= 1
    return int(np.count_nonzero(np.cumsum(steps)))


def _documents(inputs: Inputs) -> dict[str, list[DocumentScore]]:
    """Returns the scored documents of each model, in the order of the models' names."""
    tables = {
        role.removeprefix(ROLE): inputs[role] / "documents.parquet" for role in sorted(inputs) if role.startswith(ROLE)
    }
    return {model: read_table(path, list(DOCUMENT_SCORES)).to_pylist() for model, path in tables.items()}


def _texts(config: BaselinesConfig, inputs: Inputs) -> Texts:
    """Returns the held-out documents by id."""
    return {
        row["id"]: (row["text"][: row["prompt_chars"]].encode(), row["text"][row["prompt_chars"] :].encode())
        for row in heldout_documents(inputs["dedup"] / "kept", config.heldout_documents)
    }


def _windows(config: BaselinesConfig, inputs: Inputs, work: Path) -> Part:
    """Returns the part with `windows.npy`, the different hashes of all scored parts in ascending order."""
    import numpy as np

    def make(folder: Path) -> dict[str, Any]:
        sizes: dict[str, int] = {}
        for row in (row for rows in _documents(inputs).values() for row in rows):
            sizes[row["id"]] = max(row["bytes"], sizes.get(row["id"], 0))
        texts = _texts(config, inputs)
        hashes = [window_hashes(_cut(texts, id, size)) for id, size in sorted(sizes.items())]
        np.save(folder / "windows.npy", np.unique(np.concatenate(hashes)))
        return {}

    # Sealed once, since every part of every source is searched for them.
    return seal_part(work, "windows", make)


def _search_part(config: BaselinesConfig, inputs: Inputs, work: Path, source: str, number: int) -> Part:
    """Returns the result of a part: `matched.npy`, a bool for each window, and its share of the sample."""
    import numpy as np

    kept = inputs["dedup"] / "kept"
    counts = inputs["dedup"].json("summary.json")["sources"][source]
    share = config.training_bytes / max(1, counts["bytes_in"] - counts["removed_bytes"])

    def make(folder: Path) -> dict[str, Any]:
        windows = np.load(_windows(config, inputs, work).folder / "windows.npy")
        matched, size = np.zeros(len(windows), bool), 0
        # A table of the first bits of the hashes rules out nearly all windows of the training text.
        begins = np.zeros(2**24, bool)
        begins[windows >> np.uint64(40)] = True
        sample: list[dict[str, str]] = []
        for block in _blocks(_training(part_files(kept, source)[number], share, sample)):
            hashes = window_hashes(block)
            size += len(block) - block.count(BOUNDARY)
            hashes = hashes[begins[hashes >> np.uint64(40)]]
            places = np.minimum(np.searchsorted(windows, hashes), max(0, len(windows) - 1))
            matched[places[windows[places] == hashes]] = True
        np.save(folder / "matched.npy", matched)
        write_rows(folder / "sample.parquet", SAMPLE, sample)
        return {"bytes": size}

    return seal_part(work, f"{source}-{number:05d}", make)


def _training(path: Path, share: float, sample: list[dict[str, str]]) -> Iterator[bytes]:
    """Yields the training documents of a part, and appends those of the sample to it."""
    for batch in stream_batches(path, ["text", "content_hash", "split"]):
        for row in batch.to_pylist():
            if row["split"] == "train":
                # Other digits of the hash than those that decide the split.
                if int(row["content_hash"][16:32], 16) < share * 2**64:
                    sample.append({"text": row["text"]})
                yield row["text"].encode()


def _blocks(documents: Iterable[bytes]) -> Iterator[bytes]:
    """Yields documents in blocks of about BLOCK bytes; a byte that no text has keeps windows from spanning two."""
    block = bytearray()
    for document in documents:
        block += document + bytes([BOUNDARY])
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _sample(part: Part) -> list[bytes]:
    return [text.encode() for text in read_table(part.folder / "sample.parquet")["text"].to_pylist()]


def _cut(texts: Texts, id: str, size: int) -> bytes:
    """Returns the scored part of a document, which has so many bytes."""
    return texts[id][1][:size]


def _byte_models(
    order: int, source: str, known: Sequence[bytes], texts: Texts, cuts: Sequence[tuple[str, int]]
) -> list[BaselineScore]:
    """Returns the scores of the models of bytes for scored parts, each given as the document's id and its bytes."""
    unigram, ngram = KneserNey.fit(known, 1), KneserNey.fit(known, order)
    return [
        {
            "source": source,
            "id": id,
            "bytes": size,
            "unigram_bits": unigram.bits(_cut(texts, id, size), texts[id][0]),
            "ngram_bits": ngram.bits(_cut(texts, id, size), texts[id][0]),
        }
        for id, size in cuts
    ]


STAGE = Stage(
    "baselines",
    VERSION,
    BaselinesConfig,
    run,
    estimate=lambda config: estimates.estimate("baselines", config.expected, small=10.0),
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
