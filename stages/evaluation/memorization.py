"""Stage `memorization`: what one exported model gives away of the data that it was trained on.

    atom run atom-tiny --only memorization-online-rlhf

A document's first tokens are the prefix, and the model continues them greedily (Carlini et al. 2023, arXiv 2202.07646).
Measured is the share of documents whose next tokens come out verbatim, and the number of matching tokens before the
first other one, by source and by times seen. Held-out documents are the baseline.

A document is seen once for each row of an order that holds its prefix and continuation, in all phases up to the model.
The prompts of reinforcement learning are not counted, nor is the order of an earlier run that a phase continues from.
A prefix ends where all later tokens carry loss.

A greedy continuation equals the document up to its first other token, so one forward pass over the document shows both
measures: the continuation matches as long as each next token is the most probable one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pipeline.core.bounds import Context, Range, Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage
from pipeline.core.store import once
from stages.confidence import binomial, clustered, wilson
from stages.data.order.shards import document_files, first_tokens, shard_name
from stages.evaluation import estimates
from stages.evaluation.estimates import EngineConfig
from stages.evaluation.scores import MemorizationScores, Regurgitation
from stages.formats.seeds import seed_of, split_mix
from stages.formats.table import (
    Int32,
    Int64,
    String,
    columns_of,
    order_files,
    stream_part_batches,
    write_json,
    write_rows,
)
from stages.generation.engine import LanguageModel
from stages.generation.samplers import open_model

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
# Training documents, drawn by their places, whose readings are counted; about as many are in memory.
CANDIDATES = 1 << 18
# Assumed strata of a source, for `atom plan` alone.
STRATA = 12


class DocumentRow(TypedDict):
    """A drawn document."""

    id: String
    """id of the document"""
    source: String
    """source of the document"""
    split: String
    """`train` or `heldout`"""
    times_seen: Int64
    """rows of the orders that hold its prefix and continuation; 0 if held out"""
    prefix: Int32
    """first tokens of the document, which the model receives"""
    continuation: Int32
    """tokens after them that are compared"""
    matching: Int32
    """tokens of the continuation before the first one that a greedy continuation gets wrong"""


DOCUMENTS = columns_of(DocumentRow)


class Place(TypedDict):
    """A document and its place in the token shards."""

    id: str
    source: str
    split: str
    part: int
    ordinal: int
    times_seen: int


class MemorizationSection(Config):
    """Memorization of the training data by the final model: verbatim continuations."""

    documents: Annotated[int, Range(2, 1e5)] = 50
    """maximum number of documents per source and range of times seen"""
    prefix_tokens: Context = 50
    """tokens of a document that the model receives"""
    continuation_tokens: Context = 50
    """tokens after them that are compared"""

    @property
    def length(self) -> int:
        return self.prefix_tokens + self.continuation_tokens

    def tokens(self, sources: int) -> int:
        """Returns the tokens that the evaluation of a model reads, at most."""
        return sources * STRATA * self.documents * self.length


class MemorizationConfig(MemorizationSection, EngineConfig):
    """Config of the stage."""

    seed: Seed
    """seed of the recipe"""

    @cached_property
    def salt(self) -> int:
        return seed_of("memorization/documents", self.seed)

    def ticket(self, id: str) -> float:
        """Returns a document's number in the lottery, from 0 to 1; the least are drawn."""
        return int.from_bytes(hashlib.blake2b(f"{self.salt}/{id}".encode(), digest_size=8).digest(), "big") / 2**64


def run(config: MemorizationConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Measures the export inputs["model"] on the token shards inputs["tokens"].

    The inputs order-<phase> are of every phase that trained the model. Seals `documents.parquet` and `scores.json`,
    which follows from it (`summary`). Resumes from `work`, which keeps the lottery and every finished source.

    Raises:
        AtomError: The orders read no document that is long enough, or a shard is damaged.
    """
    from transformers import AutoTokenizer

    places: list[Place] = once(work / "drawn.json", partial(draw, config, inputs))
    documents, completed = list[DocumentRow](), 0
    folder = inputs["model"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with closing(open_model(config.engine, folder, tokenizer, work)) as model:
        for source, group in groupby(places, key=lambda place: place["source"]):
            chosen = list(group)
            documents += once(work / f"documents-{source}.json", partial(_continue, config, inputs, model, chosen))
            completed += len(chosen)
            report.progress(completed, len(places), "documents")
    write_rows(out / "documents.parquet", DOCUMENTS, documents)
    scores = summary(documents)
    write_json(out / "scores.json", {**scores, **config.engine.stated()})
    for seen, row in scores["by_times_seen"].items():
        share = row["identical"]
        report.note(f"seen {seen} times: {share['value']:.1%} of {share['n']} documents are continued verbatim")


def draw(config: MemorizationConfig, inputs: Inputs) -> list[Place]:
    """Returns the places of the documents that the lottery draws, by source."""
    strata: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for place in _count_readings(config, inputs):
        strata[place["source"], stratum(place["times_seen"])].append(place)
    if not strata:
        raise AtomError(
            f"memorization: the orders read no document of {config.length} tokens whose first {config.prefix_tokens} "
            "are all that carries no loss; lower evaluation.memorization.prefix_tokens or continuation_tokens"
        )
    drawn = [place for group in strata.values() for place in _first(config, group)]
    # Held-out documents, seen 0 times, show how often a text is continued verbatim without having been read.
    for source, files in document_files(inputs["tokens"].path).items():
        drawn += _first(config, _heldout(config, source, files))
    return sorted(drawn, key=lambda place: (place["source"], place["split"], place["part"], place["ordinal"]))


def _first(config: MemorizationConfig, places: Iterable[Place]) -> list[Place]:
    return heapq.nsmallest(config.documents, places, key=lambda place: (config.ticket(place["id"]), place["id"]))


def _count_readings(config: MemorizationConfig, inputs: Inputs) -> list[Place]:
    """Returns the candidates with their readings. Streams the orders once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # The sample is drawn by place and not while reading, so that a document is counted in all orders or in none.
    share = CANDIDATES / max(sum(inputs["tokens"].json("meta.json")["documents"]["train"].values()), 1)
    candidates: dict[str, Place] = {}
    # Rows that hold prefix and continuation, with loss on all tokens that are compared.
    whole = (pc.field("length") >= config.length) & (pc.field("loss_from") < config.prefix_tokens)
    place_columns = ["id", "source", "part", "ordinal"]
    columns = [*place_columns, "offset", "length", "loss_from"]
    for role in sorted(role for role in inputs if role.startswith("order-")):
        for batch in stream_part_batches(order_files(inputs[role].path), columns):
            # A row that continues a document does not begin with its prefix.
            beginnings = pa.Table.from_batches([batch]).filter(pc.field("offset") == 0)
            for row in _counted(_sampled(config, beginnings.filter(whole), share), place_columns):
                place = _place(row, "train", row["part"])
                candidates.setdefault(row["id"], place)["times_seen"] += row["count_all"]
    return list(candidates.values())


def _sampled(config: MemorizationConfig, rows: pa.Table, share: float) -> pa.Table:
    """Returns the rows of a share of all documents, chosen by a hash of their places in the corpus."""
    import numpy as np
    import pyarrow as pa

    if share >= 1:
        return rows
    part, ordinal = (rows[name].to_numpy().astype(np.uint64) for name in ("part", "ordinal"))
    # Part and ordinal in one number: a place of the corpus, the same in every order.
    hashes = split_mix(part << np.uint64(40) | ordinal, "memorization/candidates", config.seed)
    return rows.filter(pa.array(hashes < np.uint64(share * 2**64)))


def _counted(table: pa.Table, columns: list[str]) -> Any:
    """Returns the distinct values of some columns, each with `count_all`, its number of rows."""
    return table.group_by(columns).aggregate([([], "count_all")]).to_pylist()


def _heldout(config: MemorizationConfig, source: str, files: Sequence[tuple[int, Path]]) -> Iterator[Place]:
    """Yields the held-out documents of a source that are long enough."""
    import pyarrow as pa
    import pyarrow.compute as pc

    eligible = (pc.field("source") == source) & (pc.field("split") == "heldout")
    # `loss_from` counts tokens here. In an order it counts targets, one less, hence the other comparison there.
    eligible &= (pc.field("tokens") >= config.length) & (pc.field("loss_from") <= config.prefix_tokens)
    for part, file in files:
        for batch in stream_part_batches([file], ["id", "source", "split", "ordinal", "tokens", "loss_from"]):
            rows = pa.Table.from_batches([batch]).filter(eligible)
            yield from (_place(row, "heldout", part) for row in rows.to_pylist())


def _place(row: Mapping[str, Any], split: str, part: int) -> Place:
    return Place(id=row["id"], source=row["source"], split=split, part=part, ordinal=row["ordinal"], times_seen=0)


def _continue(
    config: MemorizationConfig, inputs: Inputs, model: LanguageModel, places: Sequence[Place]
) -> list[DocumentRow]:
    """Returns the rows of the drawn documents of one source, which are sorted by shard."""
    tokens, rows = inputs["tokens"].path, list[DocumentRow]()
    # One shard after the other, whose tokens are read in one pass.
    for (source, split, part), group in groupby(places, key=lambda row: (row["source"], row["split"], row["part"])):
        chosen = list(group)
        name = shard_name(split, source, part)
        ids = first_tokens(tokens, name, [place["ordinal"] for place in chosen], config.length)
        for place, matching in zip(chosen, model.matching_tokens(ids.tolist(), config.prefix_tokens), strict=True):
            rows.append(
                {
                    "id": place["id"],
                    "source": source,
                    "split": split,
                    "times_seen": place["times_seen"],
                    "prefix": config.prefix_tokens,
                    "continuation": config.continuation_tokens,
                    "matching": matching,
                }
            )
    return rows


def stratum(times_seen: int) -> str:
    """Returns the range that a number of times seen lies in: `0`, `1`, `2-3`, `4-7`, and so on."""
    # The largest power of two that is not above it.
    low = 1 << times_seen.bit_length() >> 1
    return str(times_seen) if low < 2 else f"{low}-{2 * low - 1}"


def summary(documents: Sequence[DocumentRow]) -> MemorizationScores:
    """Returns `scores.json` from the table alone, so that it can be recomputed. Errors are over documents."""
    strata: dict[str, list[DocumentRow]] = defaultdict(list)
    by_source: dict[str, dict[str, list[DocumentRow]]] = defaultdict(lambda: defaultdict(list))
    for row in documents:
        strata[stratum(row["times_seen"])].append(row)
        by_source[row["source"]][stratum(row["times_seen"])].append(row)
    return {
        "prefix_tokens": documents[0]["prefix"],
        "continuation_tokens": documents[0]["continuation"],
        "by_times_seen": _by_stratum(strata),
        "by_source": {source: _by_stratum(parts) for source, parts in sorted(by_source.items())},
    }


def _by_stratum(strata: Mapping[str, Sequence[DocumentRow]]) -> dict[str, Regurgitation]:
    # By number, since as texts 16-31 would come before 2-3.
    return {name: _summarize(strata[name]) for name in sorted(strata, key=lambda name: int(name.split("-")[0]))}


def _summarize(rows: Sequence[DocumentRow]) -> Regurgitation:
    identical = [int(row["matching"] == row["continuation"]) for row in rows]
    low, high = wilson(sum(identical), len(rows))
    return {
        "identical": {**binomial(identical), "low": low, "high": high},
        "matching": clustered([row["matching"] for row in rows]) if len(rows) > 1 else None,
    }


STAGE = Stage("memorization", VERSION, MemorizationConfig, run, **estimates.of_engine())
