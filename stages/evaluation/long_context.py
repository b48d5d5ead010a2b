"""Long-context evaluation: measurements of stage `evaluate`, for recipes that have `evaluation.context`.

- **Passkeys**: a key at a given depth of a text of a given length in tokens, with the question at its end. Text
  comes from held-out documents, the key from those that training never uses (stages/data/synthetic/passkeys.py). The
  answer counts if every token of it is the most probable one given the correct ones before it, which is equivalent to
  greedy decoding and takes one forward pass for each item.
- **Retrieval**, with `retrieval`: tasks that need several statements of the text (stages/data/synthetic/retrieval.py),
  spread over it at drawn places, and scored in the same way.
- **Loss by position**: bits per token in held-out documents that all have the longest length, by the number of tokens
  before: 0–63, 64–127, 128–255, … The documents are the same at every position, so if a later token costs less than
  an earlier one, the model uses what it has read.

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
from stages.data.seeds import seed_of
from stages.data.synthetic import passkeys, retrieval
from stages.data.table import Double, Int32, String, columns_of
from stages.evaluation.confidence import binomial, ratio
from stages.evaluation.engine import LanguageModel
from stages.evaluation.heldout import HeldoutDocument
from stages.evaluation.pieces import Piece
from stages.evaluation.scores import LongContextScores, Mean

FIRST_BUCKET = 64

Encode = Callable[[str], list[int]]


class PasskeyRow(TypedDict):
    """The answer to a passkey item of `length` tokens, with the key at `depth` from 0 (start) to 1 (end)."""

    id: String
    length: Int32
    depth: Double
    expected: String
    output: String
    score: Annotated[int, "int8"]


class RetrievalRow(TypedDict):
    """The answer to a task in a text of `length` tokens, of which the first needed statement begins at `depth`."""

    id: String
    task: String
    length: Int32
    depth: Double
    expected: String
    output: String
    score: Annotated[int, "int8"]


class PositionRow(TypedDict):
    """The bits of the tokens of a document at the positions `first` to `last`."""

    source: String
    id: String
    first: Int32
    last: Int32
    tokens: Int32
    nll_bits: Double


PASSKEY = columns_of(PasskeyRow)
RETRIEVAL = columns_of(RetrievalRow)
POSITIONS = columns_of(PositionRow)


class RetrievalSection(Config):
    """Tasks in long texts that need several statements."""

    kinds: tuple[retrieval.Kind, ...] = Field(
        tuple(retrieval.KINDS), min_length=1, max_length=len(retrieval.KINDS), description="kinds of tasks"
    )
    lengths: tuple[Context, ...] = Field(
        min_length=1, max_length=100, description="lengths of items in tokens, increasing"
    )
    per_length: Annotated[int, Range(1, 1e5)] = Field(description="items per kind and length")

    @model_validator(mode="after")
    def _check_distinct(self) -> RetrievalSection:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds names a kind twice; put each once")
        _require_increasing("lengths", self.lengths)
        return self

    @property
    def tokens(self) -> int:
        """Tokens of all items."""
        return len(self.kinds) * self.per_length * sum(self.lengths)


class ContextSection(Config):
    """Evaluation on long texts: retrieval of passkeys and of several statements, and the loss by position."""

    lengths: tuple[Context, ...] = Field(
        min_length=1, max_length=100, description="lengths of passkey items in tokens, increasing"
    )
    depths: tuple[Share, ...] = Field(
        min_length=1,
        max_length=101,
        description="positions of the key in the text, from 0 (start) to 1 (end), increasing",
    )
    per_cell: Annotated[int, Range(1, 1e5)] = Field(description="passkey items per length and depth")
    documents: Annotated[int, Range(2, 1e6)] = Field(
        description="maximum number of long held-out documents for the loss by position"
    )
    digits: Annotated[int, Range(2, 9)] = Field(
        6, description="digits of a passkey; use the same number as in the training data"
    )
    retrieval: RetrievalSection | None = added(None, "tasks that need several statements of a text; null: none")

    @model_validator(mode="after")
    def _check_increasing(self) -> ContextSection:
        _require_increasing("lengths", self.lengths)
        _require_increasing("depths", self.depths)
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return max(self.lengths[-1], self.retrieval.lengths[-1] if self.retrieval else 0)

    @property
    def tokens(self) -> int:
        """Tokens that a model reads."""
        keys = len(self.depths) * self.per_cell * sum(self.lengths)
        return keys + self.documents * self.lengths[-1] + (self.retrieval.tokens if self.retrieval else 0)

    @property
    def pieces(self) -> int:
        return len(self.lengths) + 1 + (len(self.retrieval.lengths) if self.retrieval else 0)


def _require_increasing(name: str, values: Sequence[float]) -> None:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name} = {shown(values)} are not increasing; put each once, the least first")


def pieces(
    section: ContextSection, tokenizer: Any, encode: Encode, read: Callable[[], Sequence[HeldoutDocument]]
) -> list[Piece[LanguageModel]]:
    """The pieces of a model's evaluation: the rows of `passkey.parquet` of each length, those of `retrieval.parquet` if
    it is asked for, and those of `positions.parquet`.

    read: the documents in the order of a fixed lottery. encode: text to token ids, as in training. A piece raises
    AtomError if a length leaves no room for a key, or if the documents are too few or too short.
    """

    @cache
    def documents() -> Sequence[HeldoutDocument]:
        return read()

    @cache
    def filler() -> Sequence[int]:
        return array("i", (token for row in documents() for token in encode(f"{row['text']}\n\n")))

    def cells(model: LanguageModel, length: int) -> list[PasskeyRow]:
        return _score_cells(section, length, model, tokenizer, encode, filler())

    def tasks(model: LanguageModel, length: int) -> list[RetrievalRow]:
        assert section.retrieval is not None
        return _score_tasks(section.retrieval, length, model, tokenizer, encode, filler())

    def positions(model: LanguageModel) -> list[PositionRow]:
        return _loss_by_position(model, encode, documents(), section.lengths[-1], section.documents)

    return [
        *(Piece(f"passkey-{length}", partial(cells, length=length)) for length in section.lengths),
        *(
            Piece(f"retrieval-{length}", partial(tasks, length=length))
            for length in (section.retrieval.lengths if section.retrieval else ())
        ),
        Piece("positions", positions),
    ]


def report_passkeys(rows: Sequence[PasskeyRow], report: Report) -> None:
    for length in dict.fromkeys(row["length"] for row in rows):
        scores = [row["score"] for row in rows if row["length"] == length]
        report.note(f"passkey in {length} tokens: {sum(scores)} of {len(scores)} found")


def report_retrieval(rows: Sequence[RetrievalRow], report: Report) -> None:
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        scores = [row["score"] for row in rows if (row["task"], row["length"]) == (task, length)]
        report.note(f"{task} in {length} tokens: {sum(scores)} of {len(scores)} right")


def items(section: ContextSection, length: int, encode: Encode, filler: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """(id, depth, key, token ids [length], ids of the answer at their end) of every item of one length.

    filler: the text around the keys, as tokens; an item starts at a drawn position of it. The items depend only on the
    section and the filler.
    """
    question = encode(passkeys.QUESTION)
    for depth in section.depths:
        rng = random.Random(seed_of(f"context/passkey/{length}/{depth:g}", section.digits))
        for n in range(section.per_cell):
            key = passkeys.draw_key(rng, section.digits, evaluation=True)
            statement, answer = encode(passkeys.STATEMENT.format(key)), encode(passkeys.ANSWER.format(key))
            available = length - len(statement) - len(question) - len(answer)
            _require_room("evaluation.context.lengths", length, available, len(filler), "key and question alone take")
            start, cut = rng.randrange(len(filler) - available + 1), round(depth * available)
            text = filler[start : start + available]
            ids = [*text[:cut], *statement, *text[cut:], *question, *answer]
            yield f"{length}/{depth:g}/{n:03d}", depth, key, ids, answer


def retrieval_items(
    section: RetrievalSection, length: int, encode: Encode, filler: Sequence[int]
) -> Iterator[tuple[str, retrieval.Kind, float, str, list[int], list[int]]]:
    """(id, kind, depth of the first needed statement, answer, token ids [length], ids of the answer at their end) of
    every item of one length. The items depend only on the section and the filler.
    """
    for kind in section.kinds:
        rng = random.Random(seed_of(f"context/retrieval/{kind}/{length}", 0))
        for n in range(section.per_length):
            task = retrieval.draw_task(kind, rng, evaluation=True)
            statements = [encode(text) for text in task.statements]
            question, answer = encode(task.question), encode(task.answer)
            room = length - sum(map(len, statements)) - len(question) - len(answer)
            _require_room(
                "evaluation.context.retrieval.lengths", length, room, len(filler), f"a task of {kind} alone takes"
            )
            start = rng.randrange(len(filler) - room + 1)
            text, ids, last = filler[start : start + room], list[int](), 0
            places = retrieval.draw_places(rng, len(statements), room)
            for statement, place in zip(statements, places, strict=True):
                ids += [*text[last:place], *statement]
                last = place
            ids += [*text[last:], *question, *answer]
            depth = places[task.needed[0]] / room if room else 0.0
            yield f"{kind}/{length}/{n:03d}", kind, depth, task.answer.strip(), ids, answer


def _require_room(setting: str, length: int, room: int, available: int, what: str) -> None:
    """That an item leaves `room` tokens for text, and all held-out text has as many."""
    if room < 0:
        raise AtomError(f"evaluate: {setting} names {length} tokens, but {what} {length - room}; leave it out")
    if room > available:
        raise AtomError(
            f"evaluate: {setting} names {length} tokens, but all held-out text has {available}; hold out more or ask "
            "for less"
        )


def _score_tasks(
    section: RetrievalSection, length: int, model: LanguageModel, tokenizer: Any, encode: Encode, filler: Sequence[int]
) -> list[RetrievalRow]:
    rows: list[RetrievalRow] = []
    for name, kind, depth, expected, ids, answer in retrieval_items(section, length, encode, filler):
        output, score = _answered(model, tokenizer, ids, answer)
        rows.append(
            {"id": name, "task": kind, "length": length, "depth": depth, "expected": expected, "output": output,
             "score": score}
        )  # fmt: skip
    return rows


def _answered(model: LanguageModel, tokenizer: Any, ids: Sequence[int], answer: list[int]) -> tuple[str, int]:
    """What a greedy decoder writes in the place of the answer at the end of ids, and 1 if it is the answer."""
    predicted = model.likeliest(ids, len(answer))
    output = tokenizer.decode(predicted, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return output, int(predicted == answer)


def _score_cells(
    section: ContextSection, length: int, model: LanguageModel, tokenizer: Any, encode: Encode, filler: Sequence[int]
) -> list[PasskeyRow]:
    rows: list[PasskeyRow] = []
    for name, depth, key, ids, answer in items(section, length, encode, filler):
        output, score = _answered(model, tokenizer, ids, answer)
        rows.append({"id": name, "length": length, "depth": depth, "expected": key, "output": output, "score": score})
    return rows


def _loss_by_position(
    model: LanguageModel, encode: Encode, documents: Sequence[HeldoutDocument], length: int, limit: int
) -> list[PositionRow]:
    """One row for each bucket of each document, of the first `limit` documents of at least `length` tokens."""
    rows: list[PositionRow] = []
    longest = count = 0
    for document in documents:
        ids = encode(document["text"])[:length]
        longest = max(longest, len(ids))
        if len(ids) < length:
            continue
        count += 1
        bits = model.token_bits(ids)
        for first, last in buckets(length):
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
        if count == limit:
            break
    if count < 2:
        raise AtomError(
            f"evaluate: {count} held-out documents have {length} tokens (the longest has {longest}), and "
            "evaluation.context needs two; hold out longer documents or ask for shorter lengths"
        )
    return rows


def buckets(length: int) -> list[tuple[int, int]]:
    """(first, last) position of each bucket: 0–63, then each as long as all before it, up to `length` - 1."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(a, min(b, length) - 1) for a, b in pairwise(edges) if a < length]


def summarize_retrieval(rows: Sequence[RetrievalRow]) -> dict[str, dict[str, Mean]]:
    """`retrieval` of scores.json: by kind and length."""
    scores: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(str(row["length"]), []).append(row["score"])
    return {task: {n: binomial(values) for n, values in by_length.items()} for task, by_length in scores.items()}


def summary(keys: Sequence[PasskeyRow], by_position: Sequence[PositionRow]) -> LongContextScores:
    """`passkey` and `loss_by_position` of scores.json, from the two tables alone.

    Standard errors of the loss are over documents; these are the same in every bucket, so differences between buckets
    have smaller errors.
    """
    lengths = sorted({row["length"] for row in keys})

    def scores_of(length: int, depth: float | None = None) -> list[int]:
        return [row["score"] for row in keys if row["length"] == length and depth in (None, row["depth"])]

    depths = sorted({row["depth"] for row in keys})
    return {
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
