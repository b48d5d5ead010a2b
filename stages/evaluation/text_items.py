"""Stage `text-items`: evaluation items that are made of held-out text, and the answers of a byte n-gram model to them.

A model of a few million parameters knows no facts and follows no instructions. It does know what goes on in a text, and
these items ask for that (stages/evaluation/item_makers.py). The stage `evaluate` puts them to every exported model:

- of **four continuations** a model chooses the one of which the beginning saves most bits per byte, compared with the
  continuation alone: the likeliest one would often be that of the commonest words (Holtzman et al. 2021, arXiv
  2104.08315). A guess is right in a quarter of the items, since the place of the right one is drawn;
- a **line of Python** that a model writes greedily is right if the text parses with it; no line is never
  right, but a bracket alone can be.

One document gives one item of a kind at most; documents of one work are alike all the same, and intervals do not count
that. Items depend on the documents and the settings, and completions also on the version of Python that parses. The
n-gram model is fitted to documents of the training split of the same sources.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName, Words
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added
from stages.confidence import binomial, wilson
from stages.evaluation import item_makers
from stages.evaluation.bits_per_byte import HeldoutDocument, heldout_texts, token_ids
from stages.evaluation.item_makers import CHOICES, MOST_BYTES, completion, from_document, parses, retrieval
from stages.evaluation.ngram import KneserNey
from stages.evaluation.scores import ItemScores, Proportion
from stages.formats.seeds import seed_of
from stages.formats.table import String, columns_of, part_files, read_table, stream_batches, write_rows
from stages.generation.engine import LanguageModel

VERSION = 1
ORDER = 5
# Of the smallest vocabularies, for the plan; larger ones have longer tokens.
BYTES_PER_TOKEN = 2
# Bytes of training text that the n-gram model is fitted to, at most.
BASELINE_BYTES = 2**25
# Tokens and bytes of the longest line that completes a program.
LINE_TOKENS, LINE_BYTES = 32, 80
COMPLETION = "completion"
KNOWN = f"{', '.join(item_makers.BEFORE)}, {COMPLETION} and retrieval-<bytes>"
PATTERN = "|".join([*item_makers.BEFORE, COMPLETION, "retrieval-[1-9][0-9]{0,4}"])


def _distance_problem(kind: str) -> str | None:
    distance = int(kind.partition("-")[2] or 0)
    if distance <= MOST_BYTES:
        return None
    return f"needs documents of {distance} bytes, which are read up to {MOST_BYTES}; lower the distance"


Kind = Annotated[str, Words(40, f"kind of items; known are {KNOWN}", PATTERN, test=_distance_problem)]
Bytes = Annotated[int, Range(8, 2**16)]
Place = Annotated[int, "int8"]


class TextItems(Config):
    """Evaluation items that are made of held-out text."""

    kinds: Annotated[dict[Kind, Annotated[int, Range(2, 1e5)]], Field(min_length=1, max_length=32)]
    """maximum number of items by kind: words, lines, options, completion, and retrieval-<bytes> for a key that is
    stated so many bytes before"""
    prefix_bytes: Bytes = 256
    """maximum bytes of the beginning of an item; of retrieval the distance counts instead"""
    choice_bytes: Bytes = 32
    """bytes of each of the four continuations of words, lines and options"""

    @property
    def tokens(self) -> int:
        """Tokens that a model reads, about."""
        return sum(self.kinds.values()) * CHOICES * (self.prefix_bytes + self.choice_bytes) // BYTES_PER_TOKEN


class TextItemsConfig(TextItems):
    """The items, and the sources whose text may not be shown."""

    without: tuple[SourceName, ...] = added((), max_length=MOST_SOURCES)
    """sources whose texts the release does not publish"""


class TextItem(TypedDict):
    """An item, with the answer of the n-gram model."""

    id: String
    """id of the document"""
    kind: String
    """`words`, `lines`, `options`, `retrieval-<bytes>` or `completion`"""
    source: String
    """source of the document"""
    prefix: String
    """the beginning"""
    choices: String
    """the four continuations, as JSON; none of a line that is to be written"""
    answer: Place
    """number of the right continuation, from 0"""
    baseline_output: String
    """the answer of the n-gram model"""
    baseline: Place
    """1 if it is right, otherwise 0"""


class TextAnswer(TypedDict):
    """The answer of a model to an item."""

    id: String
    """id of the document"""
    kind: String
    """kind of the item"""
    gains: String
    """bits per byte that the beginning saves of each continuation, as JSON; none of a line"""
    output: String
    """the chosen continuation, or the line"""
    score: Place
    """1 if it is right, otherwise 0"""
    baseline: Place
    """the same of the n-gram model"""


ITEMS, ANSWERS = columns_of(TextItem), columns_of(TextAnswer)


def run(config: TextItemsConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Makes items of the held-out documents of inputs["dedup"], and answers them with an n-gram model.

    Seals `questions.parquet`. In memory are the held-out text, bounded by `heldout_texts`, and an n-gram model of about
    BASELINE_BYTES of text.

    Raises:
        AtomError: A kind has fewer than two items.
    """
    kept = inputs["dedup"] / "kept"
    documents = [document for document in heldout_texts(kept) if document["source"] not in config.without]
    items: list[TextItem] = []
    for kind, limit in sorted(config.kinds.items()):
        kind_items = list(islice(_made(kind, _maker(kind, config), documents), limit))
        if len(kind_items) < 2:
            raise AtomError(
                f"text-items: the held-out documents give {len(kind_items)} items of kind {kind}, and two are needed "
                "for an interval; hold out more or longer documents, or leave it out of evaluation.text_items.kinds"
            )
        report.note(f"{len(kind_items)} items of {kind}")
        items += kind_items
    ngrams = KneserNey.fit(_training_text(kept, sorted({item["source"] for item in items})), ORDER)
    for item in items:
        prefix, choices = item["prefix"].encode(), json.loads(item["choices"])
        if choices:
            bits = [(ngrams.bits(text), ngrams.bits(text, prefix)) for text in map(str.encode, choices)]
            item["baseline_output"] = choices[best(gains(choices, bits))]
        else:
            item["baseline_output"] = _greedy_line(ngrams, prefix)
        item["baseline"] = is_right(item, item["baseline_output"])
    write_rows(out / "questions.parquet", ITEMS, items)


Make = Callable[[bytes, random.Random], item_makers.Item | None]


def _maker(kind: str, config: TextItems) -> Make:
    """Returns the function that makes an item of that kind."""
    if before := item_makers.BEFORE.get(kind):
        return partial(from_document, before=before, prefix_bytes=config.prefix_bytes, choice_bytes=config.choice_bytes)
    if kind == COMPLETION:
        return partial(completion, prefix_bytes=config.prefix_bytes)
    return partial(retrieval, distance=int(kind.partition("-")[2]))


def _made(kind: str, make: Make, documents: Sequence[HeldoutDocument]) -> Iterator[TextItem]:
    """Yields the items of a kind, without the answers of the n-gram model."""
    for document in documents:
        rng = random.Random(seed_of(f"text-items/{kind}", int(document["content_hash"], 16)))
        if (item := make(document["text"].encode()[:MOST_BYTES], rng)) is None:
            continue
        # Equal gains are resolved in favor of the first, so a drawn place makes a tie a guess.
        texts = [text.decode() for text in item[1]]
        answer = rng.randrange(len(texts)) if texts else 0
        yield {
            "id": document["id"],
            "kind": kind,
            "source": document["source"],
            "prefix": item[0].decode(),
            "choices": json.dumps([*texts[1 : answer + 1], *texts[:1], *texts[answer + 1 :]], ensure_ascii=False),
            "answer": answer,
            "baseline_output": "",
            "baseline": 0,
        }


def _training_text(kept: Path, sources: Sequence[str]) -> Iterator[bytes]:
    """Yields training documents of some sources: all, or the first of each part in equal shares of BASELINE_BYTES.

    No more than these documents is read, whatever the size of the corpus.
    """
    files = [path for source in sources for path in part_files(kept, source)]
    for path in files:
        remaining = BASELINE_BYTES // len(files)
        rows = (row for batch in stream_batches(path, ["text", "split"], 256) for row in batch.to_pylist())
        for text in (row["text"].encode() for row in rows if row["split"] == "train"):
            remaining -= len(text)
            if remaining < 0:
                break
            yield text


def _greedy_line(ngrams: KneserNey, prefix: bytes) -> str:
    """Returns the likeliest bytes after a beginning, one by one up to the end of the line."""
    line = b""
    while len(line) < LINE_BYTES:
        tail = (prefix + line)[1 - ORDER :]
        # Each candidate after the last bytes, in one text: a byte depends on as many before it and no others.
        candidates = b"".join(tail + bytes([byte]) for byte in range(256))
        probabilities = ngrams.probabilities(candidates)[len(tail) :: len(tail) + 1]
        byte = max(range(256), key=probabilities.__getitem__)
        if byte == ord("\n"):
            break
        line += bytes([byte])
    return line.decode("utf-8", "replace")


def gains(choices: Sequence[str], bits: Iterable[tuple[float, float]]) -> list[float]:
    """Returns the bits per byte that a beginning saves, from the bits of each choice alone and after the beginning."""
    return [(alone - after) / len(text.encode()) for text, (alone, after) in zip(choices, bits, strict=True)]


def best(values: Sequence[float]) -> int:
    """Returns the number of the largest; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def is_right(item: Mapping[str, Any], output: str) -> int:
    """Returns 1 for the right continuation, or for a line with which the text parses."""
    choices = json.loads(item["choices"])
    return int(output == choices[item["answer"]] if choices else parses(item["prefix"] + output))


def read_items(folder: Path) -> list[TextItem]:
    rows: list[TextItem] = read_table(folder / "questions.parquet").to_pylist()
    # Items of one kind and similar length share a batch, so that little of it is padding.
    return sorted(rows, key=lambda row: (row["kind"], len(row["prefix"]), row["id"]))


def answer_items(model: LanguageModel, tokenizer: Any, items: Sequence[TextItem]) -> list[TextAnswer]:
    """Returns the answers of a model.

    The beginning and a choice are tokenized apart, so that the beginning has the same tokens before all choices. Where
    a text exceeds the model's context, the beginning is cut at its start.
    """
    rows: list[tuple[list[int], int]] = []
    prompts = []
    for item in items:
        prefix, choices = token_ids(tokenizer, item["prefix"]), json.loads(item["choices"])
        for ids in (token_ids(tokenizer, text) for text in choices):
            before = prefix[max(0, len(prefix) + len(ids) - model.context) :]
            rows += [(ids, 0), (before + ids, len(before))]
        if not choices:
            prompts.append(prefix[max(0, len(prefix) + LINE_TOKENS - model.context) :])
    bits = iter(model.bits(rows))
    lines = iter(model.continue_greedily(prompts, LINE_TOKENS) if prompts else ())

    answers: list[TextAnswer] = []
    for item in items:
        choices = json.loads(item["choices"])
        saved = gains(choices, [(next(bits), next(bits)) for _ in choices])
        if choices:
            output = choices[best(saved)]
        else:
            text = tokenizer.decode(next(lines), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            output = text.partition("\n")[0]
        row = {"id": item["id"], "kind": item["kind"], "gains": json.dumps(saved), "output": output}
        answers.append({**row, "score": is_right(item, output), "baseline": item["baseline"]})  # type: ignore[typeddict-item]
    return answers


def summary(answers: Sequence[TextAnswer]) -> dict[str, ItemScores]:
    """Returns `text_items` of scores.json by kind, from the table alone."""
    scores: dict[str, ItemScores] = {}
    for kind in sorted({row["kind"] for row in answers}):
        rows = [row for row in answers if row["kind"] == kind]
        scores[kind] = {
            "accuracy": _proportion([row["score"] for row in rows]),
            "baseline": _proportion([row["baseline"] for row in rows]),
            "chance": 0.0 if kind == COMPLETION else 1 / CHOICES,
        }
    return scores


def _proportion(scores: Sequence[int]) -> Proportion:
    low, high = wilson(sum(scores), len(scores))
    return {**binomial(scores), "low": low, "high": high}


STAGE = Stage(
    "text-items",
    VERSION,
    TextItemsConfig,
    run,
    # The time is measured on 3 MB of text; the memory is that of held-out text and n-grams at their bounds.
    estimate=lambda config: Estimate(cpu_seconds=30.0, memory_bytes=1_500_000_000, disk_bytes=10_000_000),
)
