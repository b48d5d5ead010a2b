"""Long-context evaluation: measurements of stage `evaluate`, for recipes that have `evaluation.context`.

- **Passkeys**: a key at a given depth of a text of a given length in tokens, with the question at its end. Text
  comes from held-out documents, the key from those that training never uses (stages/tasks/synthetic/passkeys.py). The
  answer counts if every token of it is the most probable one given the correct ones before it, which is equivalent to
  greedy decoding and takes one forward pass for each item.
- **Loss by position**: bits per token in held-out documents that all have the longest length, by the number of tokens
  before: 0–63, 64–127, 128–255, … The documents are the same at every position, so if a later token costs less than
  an earlier one, the model uses what it has read.
- **Gain from context**, with `evaluation.context.short`: the tokens of the same documents from position `short` on,
  once after all tokens before them, and once after the last ones in a window of `short` tokens. The scored bytes are
  the same, so the difference is what the further context is worth. Windows advance by half their length, so a token has
  at least half of `short` tokens before it. This reads each document three times.

All also measure beyond the model's `max_position_embeddings`, where the rotary embedding extrapolates: a baseline
before context extension.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Annotated, Any, TypedDict

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Range, Share
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Report, added
from pipeline.core.text import shown
from stages.confidence import binomial, ratio
from stages.evaluation.bits_per_byte import HeldoutDocument, token_bytes
from stages.evaluation.estimates import Piece
from stages.evaluation.scores import LongContextScores
from stages.formats.seeds import seed_of
from stages.formats.table import Double, Int32, Int64, String, columns_of
from stages.generation.engine import LanguageModel
from stages.tasks.synthetic import passkeys

FIRST_BUCKET = 64

Encode = Callable[[str], list[int]]


class PasskeyRow(TypedDict):
    """The answer to a passkey item of `length` tokens, with the key at `depth` from 0 (start) to 1 (end)."""

    id: String
    """`<length>/<depth>/<number>`"""
    length: Int32
    """tokens of the whole item"""
    depth: Double
    """share of the text before the key, 0 to 1"""
    expected: String
    """the answer"""
    output: String
    """the most probable token at each place of the answer, given the correct tokens before it"""
    score: Annotated[int, "int8"]
    """1 exactly if a greedy decoder writes `expected`"""


class PositionRow(TypedDict):
    """The bits of the tokens of a document at the positions `first` to `last`."""

    source: String
    """source of the document"""
    id: String
    """id of the document"""
    first: Int32
    """first position, which is the number of tokens before a token"""
    last: Int32
    """last position"""
    tokens: Int32
    """scored tokens; the first token of a document is not scored"""
    nll_bits: Double
    """minus log2 of the probability of these tokens"""


class ContextRow(TypedDict):
    """The bits of the same tokens of a document with a long and with a short context."""

    source: String
    """source of the document"""
    id: String
    """id of the document"""
    short: Int32
    """tokens of a window; the scored tokens begin at this position"""
    length: Int32
    """tokens of the document that are read"""
    bytes: Int64
    """bytes of the scored tokens"""
    nll_bits: Double
    """minus log2 of the probability of these tokens, each after all tokens before it"""
    short_nll_bits: Double
    """the same, each after the tokens before it in a window"""


PASSKEY = columns_of(PasskeyRow)
POSITIONS = columns_of(PositionRow)
CONTEXTS = columns_of(ContextRow)


class ContextSection(Config):
    """Evaluation on long texts: retrieval of passkeys, and the loss by position."""

    lengths: tuple[Context, ...] = Field(min_length=1, max_length=100)
    """lengths of passkey items in tokens, increasing"""
    depths: tuple[Share, ...] = Field(min_length=1, max_length=101)
    """positions of the key in the text, from 0 (start) to 1 (end), increasing"""
    per_cell: Annotated[int, Range(1, 1e5)]
    """passkey items per length and depth"""
    documents: Annotated[int, Range(2, 1e6)]
    """maximum number of long held-out documents for the loss by position"""
    digits: Annotated[int, Range(2, 9)] = 6
    """digits of a passkey; use the same number as in the training data"""
    short: Annotated[int, Range(2, 2**24)] | None = added(None)
    """tokens of a short context, with which tokens of long documents are scored a second time; null: none"""

    @model_validator(mode="after")
    def _check_increasing(self) -> ContextSection:
        _require_increasing("lengths", self.lengths)
        _require_increasing("depths", self.depths)
        if self.short and self.short >= self.longest:
            raise ValueError(
                f"short = {self.short} leaves no token of {self.longest}, the longest of lengths; make it shorter"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return self.lengths[-1]

    @property
    def tokens(self) -> int:
        """Tokens that a model reads."""
        keys = len(self.depths) * self.per_cell * sum(self.lengths)
        # With a short context, documents are read once more, and twice in windows.
        return keys + self.documents * self.longest * (4 if self.short else 1)

    @property
    def pieces(self) -> int:
        return len(self.lengths) + (2 if self.short else 1)


def _require_increasing(name: str, values: Sequence[float]) -> None:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name} = {shown(values)} are not increasing; put each once, the least first")


def pieces(
    section: ContextSection, tokenizer: Any, encode: Encode, read: Callable[[], Sequence[HeldoutDocument]]
) -> list[Piece[LanguageModel]]:
    """Returns the pieces of a model's evaluation.

    They give the rows of `passkey.parquet` of each length, and those of `positions.parquet` and `contexts.parquet`.

    A piece raises AtomError if a length leaves no room for a key, or if the documents are too few or too short.

    Args:
        section: The settings of the evaluation.
        tokenizer: The model's tokenizer, which decodes its answers.
        encode: Text to token ids, as in training.
        read: Reads the documents in the order of a fixed lottery.
    """

    @cache
    def documents() -> Sequence[HeldoutDocument]:
        return read()

    @cache
    def filler() -> Sequence[int]:
        return array("i", (token for row in documents() for token in encode(f"{row['text']}\n\n")))

    def cells(model: LanguageModel, length: int) -> list[PasskeyRow]:
        return _score_cells(section, length, model, tokenizer, encode, filler())

    def positions(model: LanguageModel) -> list[PositionRow]:
        return _loss_by_position(model, _long_documents(encode, documents(), section), section.longest)

    def contexts(model: LanguageModel) -> list[ContextRow]:
        assert section.short is not None
        return _gain_from_context(model, tokenizer, _long_documents(encode, documents(), section), section.short)

    return [
        *(Piece(f"passkey-{length}", partial(cells, length=length)) for length in section.lengths),
        Piece("positions", positions),
        *([Piece("contexts", contexts)] if section.short else []),
    ]


def report_passkeys(rows: Sequence[PasskeyRow], report: Report) -> None:
    for length in dict.fromkeys(row["length"] for row in rows):
        scores = [row["score"] for row in rows if row["length"] == length]
        report.note(f"passkey in {length} tokens: {sum(scores)} of {len(scores)} found")


def items(section: ContextSection, length: int, encode: Encode, filler: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Yields (id, depth, key, token ids [length], ids of the answer at their end) of every item of one length.

    The items depend only on the section and the filler.

    Args:
        section: The settings of the evaluation.
        length: Tokens of an item.
        encode: Text to token ids, as in training.
        filler: The text around the keys, as tokens; an item starts at a drawn position of it.
    """
    question = encode(passkeys.QUESTION)
    for depth in section.depths:
        # One stream for each length and depth, so that a further cell changes no item of another.
        rng = random.Random(seed_of(f"context/passkey/{length}/{depth:g}", section.digits))
        for n in range(section.per_cell):
            key = passkeys.draw_key(rng, section.digits, evaluation=True)
            statement, answer = encode(passkeys.STATEMENT.format(key)), encode(passkeys.ANSWER.format(key))
            available = length - len(statement) - len(question) - len(answer)
            if available < 0:
                raise AtomError(
                    f"evaluate: evaluation.context.lengths names {length} tokens, but key and question alone take "
                    f"{length - available}; leave it out"
                )
            if available > len(filler):
                raise AtomError(
                    f"evaluate: evaluation.context.lengths names {length} tokens, but all held-out text has "
                    f"{len(filler)}; hold out more or ask for less"
                )
            # The key stands at the depth; the question is always last.
            start, cut = rng.randrange(len(filler) - available + 1), round(depth * available)
            text = filler[start : start + available]
            ids = [*text[:cut], *statement, *text[cut:], *question, *answer]
            yield f"{length}/{depth:g}/{n:03d}", depth, key, ids, answer


def _score_cells(
    section: ContextSection, length: int, model: LanguageModel, tokenizer: Any, encode: Encode, filler: Sequence[int]
) -> list[PasskeyRow]:
    rows: list[PasskeyRow] = []
    for name, depth, key, ids, answer in items(section, length, encode, filler):
        predicted = model.likeliest(ids, len(answer))
        output = tokenizer.decode(predicted, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        score = int(predicted == answer)
        rows.append({"id": name, "length": length, "depth": depth, "expected": key, "output": output, "score": score})
    return rows


def _long_documents(
    encode: Encode, documents: Sequence[HeldoutDocument], section: ContextSection
) -> Iterator[tuple[HeldoutDocument, list[int]]]:
    """Yields the first documents that have the longest length, with so many tokens of each."""
    length, longest, count = section.longest, 0, 0
    for document in documents:
        ids = encode(document["text"])[:length]
        longest = max(longest, len(ids))
        if len(ids) == length and count < section.documents:
            count += 1
            yield document, ids
        if count == section.documents:
            return
    if count < 2:
        raise AtomError(
            f"evaluate: {count} held-out documents have {length} tokens (the longest has {longest}), and "
            "evaluation.context needs two; hold out longer documents or ask for shorter lengths"
        )


def _loss_by_position(
    model: LanguageModel, documents: Iterator[tuple[HeldoutDocument, list[int]]], length: int
) -> list[PositionRow]:
    """Returns one row for each bucket of each document."""
    rows: list[PositionRow] = []
    for document, ids in documents:
        bits = model.token_bits(ids)
        for first, last in buckets(length):
            # The first token has no bits: it comes after nothing.
            bucket_bits = bits[max(first, 1) - 1 : last]
            rows.append(
                {
                    "source": document["source"],
                    "id": document["id"],
                    "first": first,
                    "last": last,
                    "tokens": len(bucket_bits),
                    "nll_bits": float(bucket_bits.sum()),
                }
            )
    return rows


def _gain_from_context(
    model: LanguageModel, tokenizer: Any, documents: Iterator[tuple[HeldoutDocument, list[int]]], short: int
) -> list[ContextRow]:
    """Returns one row for each document."""
    rows: list[ContextRow] = []
    stride = short - short // 2
    for document, ids in documents:
        in_windows = 0.0
        for first in range(short, len(ids), stride):
            end = min(first + stride, len(ids))
            # A window ends with the scored tokens, the last of which has all others of the window before it.
            in_windows += float(model.token_bits(ids[max(0, end - short) : end])[first - end :].sum())
        rows.append(
            {
                "source": document["source"],
                "id": document["id"],
                "short": short,
                "length": len(ids),
                "bytes": token_bytes(tokenizer, ids[short:]),
                "nll_bits": float(model.token_bits(ids)[short - 1 :].sum()),
                "short_nll_bits": in_windows,
            }
        )
    return rows


def buckets(length: int) -> list[tuple[int, int]]:
    """Returns (first, last) position of each bucket: 0–63, then each as long as all before it, up to `length` - 1."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(a, min(b, length) - 1) for a, b in pairwise(edges) if a < length]


def summary(
    keys: Sequence[PasskeyRow], by_position: Sequence[PositionRow], contexts: Sequence[ContextRow] = ()
) -> LongContextScores:
    """Returns `passkey`, `loss_by_position` and `context` of scores.json, from the three tables alone.

    Standard errors of the loss are over documents; these are the same in every bucket, so differences between buckets
    have smaller errors. That of the gain is of the differences within documents.
    """
    lengths = sorted({row["length"] for row in keys})

    def scores_of(length: int, depth: float | None = None) -> list[int]:
        return [row["score"] for row in keys if row["length"] == length and depth in (None, row["depth"])]

    depths = sorted({row["depth"] for row in keys})
    scores: LongContextScores = {
        "passkey": {str(n): binomial(scores_of(length=n)) for n in lengths},
        "passkey_by_depth": {
            str(n): {f"{d:g}": binomial(scores_of(length=n, depth=d)) for d in depths} for n in lengths
        },
        "loss_by_position": {
            f"{first}-{last}": ratio(
                [(row["nll_bits"], row["tokens"]) for row in by_position if row["first"] == first], "tokens"
            )
            for first, last in sorted({(row["first"], row["last"]) for row in by_position})
        },
    }
    if contexts:
        scores["context"] = {
            "short_tokens": contexts[0]["short"],
            "tokens": contexts[0]["length"],
            "short": ratio([(row["short_nll_bits"], row["bytes"]) for row in contexts]),
            "long": ratio([(row["nll_bits"], row["bytes"]) for row in contexts]),
            "gain": ratio([(row["short_nll_bits"] - row["nll_bits"], row["bytes"]) for row in contexts]),
        }
    return scores
