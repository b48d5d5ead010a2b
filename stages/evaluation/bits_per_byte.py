"""Bits per byte of held-out documents, which are comparable between models with different tokenizers.

The measure is minus log2 p(document) over its bytes. A part without loss in training, such as the question of a
problem, is only context here as well.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from stages.data.curate.settings import work_of
from stages.formats.table import (
    Double,
    Int32,
    Int64,
    String,
    columns_of,
    part_files,
    rows_at,
    sources_of,
    stream_batches,
)
from stages.formats.tokenizer import for_corpus
from stages.generation.engine import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# Maximum number of held-out documents of a source; two are needed for a standard error.
HeldoutLimit = Annotated[int, Range(2, 1e6)]
MOST_DOCUMENTS = 100_000
# Bounds of the held-out text for long contexts.
MOST_BYTES = 2**27


class DocumentScore(TypedDict):
    """The score of a document."""

    source: String
    """source of the document"""
    id: String
    """id of the document"""
    work: String
    """work that it is a part of, if works are held out as a whole; its id if it is one by itself"""
    bytes: Int64
    """bytes of the scored text"""
    tokens: Int32
    """tokens of the scored text"""
    nll_bits: Double
    """minus log2 of the probability of the scored text"""


DOCUMENT_SCORES = columns_of(DocumentScore)


def scored_documents(documents: Sequence[DocumentScore]) -> list[DocumentScore]:
    """Returns the documents of which something was scored; all others are questions as long as the model's context.

    Raises:
        AtomError: A source has fewer than two, or they are all of one work.
    """
    scored = [row for row in documents if row["bytes"]]
    works: dict[str, set[str]] = {row["source"]: set() for row in documents}
    for row in scored:
        works[row["source"]].add(row["work"])
    if few := next((source for source, names in works.items() if len(names) < 2), None):
        raise AtomError(
            f"evaluate: source {few} has fewer than two documents to score, where those of one work count as one, and "
            "an error bar needs two; hold out more"
        )
    return scored


def score_documents(
    model: LanguageModel,
    tokenizer: Any,
    documents: Sequence[HeldoutDocument],
    conversations: Sequence[str],
    works: Mapping[str, str],
) -> list[DocumentScore]:
    """Returns the bits and bytes of each document, cut to the model's context.

    A question, the first `prompt_chars` characters, is context and is not scored, because it carries no loss in
    training; it is tokenized separately, as in training. Documents start a row in training, without a preceding token,
    so the first token of a document without a question is scored after a lone end-of-document token, and all others in
    the context of training. By the chain rule this is a proper probability of the text that covers every byte.

    Args:
        model: The model that gives the bits.
        tokenizer: Its tokenizer.
        documents: The documents, with their texts.
        conversations: Sources whose documents contain special tokens.
        works: By source that has works, the pattern of `work_of`.
    """
    rows = []
    for row in documents:
        chat = row["source"] in conversations
        prompt = token_ids(tokenizer, row["text"][: row["prompt_chars"]], chat)
        ids = prompt + token_ids(tokenizer, row["text"][row["prompt_chars"] :], chat)
        # Tokens beyond the context have no probability under this model: they are not scored, nor are their bytes
        # counted.
        rows.append((ids[: model.context], len(prompt)))
    return [
        {
            "source": row["source"],
            "id": row["id"],
            "work": _work(row, works),
            "bytes": token_bytes(tokenizer, ids[start:]),
            "tokens": len(ids[start:]),
            "nll_bits": bits,
        }
        for row, (ids, start), bits in zip(documents, rows, model.bits(rows), strict=True)
    ]


def _work(row: HeldoutDocument, works: Mapping[str, str]) -> str:
    """Returns the name of a document's work, or its id if it is one by itself."""
    pattern = works.get(row["source"])
    named = work_of(re.compile(pattern), row["id"], row["origin"]) if pattern else None
    return named or row["id"]


def token_ids(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """Returns the tokens of a document.

    The name of a special token inside the text is plain text, as in training, unless the document is a conversation in
    the release's template.
    """
    # The corpus tokenizer knows no special tokens, so their names in a text are ordinary text.
    backend = tokenizer.backend_tokenizer if chat else _corpus_tokenizer(tokenizer)
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


@lru_cache(maxsize=1)
def _corpus_tokenizer(tokenizer: Any) -> Tokenizer:
    return for_corpus(json.loads(tokenizer.backend_tokenizer.to_str()))


def token_bytes(tokenizer: Any, ids: list[int]) -> int:
    """Returns the bytes that tokens of a byte-level vocabulary stand for: one character of its alphabet is one byte.

    A cut in the middle of a multi-byte character is counted exactly; decoding would insert a replacement character.
    """
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))


class HeldoutDocument(TypedDict):
    """The columns that are read of a curated document."""

    id: str
    text: str
    source: str
    origin: str
    content_hash: str
    split: str
    prompt_chars: int


# content hash, id, file and row of a held-out document.
Ticket = tuple[str, str, Path, int]


def heldout_documents(folder: Path, limit: int) -> list[HeldoutDocument]:
    """Returns up to `limit` held-out documents of every source, by source and id.

    Args:
        folder: Folder of the kept documents.
        limit: Most documents of a source.

    Raises:
        AtomError: A source has a single one, or there are none.
    """
    documents: list[HeldoutDocument] = []
    for source in sources_of(folder):
        # By content hash, so that the same documents are drawn from any order of the files.
        drawn = heapq.nsmallest(limit, _tickets(part_files(folder, source)))
        if len(drawn) == 1:  # none: some sources have no held-out split, such as problems
            raise AtomError(f"evaluate: source {source} has 1 held-out document, two are needed for an error bar")
        documents += sorted(_read(drawn), key=lambda row: row["id"])
    if not documents:
        raise AtomError("evaluate: the curated corpus has no held-out document")
    return documents


def heldout_texts(folder: Path) -> list[HeldoutDocument]:
    """Returns the held-out documents without a prompt of all sources, in the order of the lottery.

    They end at MOST_DOCUMENTS, or where their texts have MOST_BYTES.
    """
    tickets = (
        ticket for source in sources_of(folder) for ticket in _tickets(part_files(folder, source), prompts=False)
    )
    drawn = heapq.nsmallest(MOST_DOCUMENTS, tickets)
    places = {ticket[1]: place for place, ticket in enumerate(drawn)}
    chosen: list[tuple[int, int, HeldoutDocument]] = []  # (minus the place, bytes, document), the last place first
    size = 0
    for document in _read(drawn):
        length = len(document["text"].encode())
        # The documents come in the order of files. Those last in the lottery make room for earlier ones.
        heapq.heappush(chosen, (-places[document["id"]], length, document))
        size += length
        while size - chosen[0][1] >= MOST_BYTES:
            size -= heapq.heappop(chosen)[1]
    return [document for _, _, document in sorted(chosen, key=lambda entry: -entry[0])]


def _tickets(files: Sequence[Path], prompts: bool = True) -> Iterator[Ticket]:
    """Yields a ticket for every held-out document of some files; without `prompts`, only of those without a prompt."""
    import pyarrow.compute as pc

    for path in files:
        first = 0
        for batch in stream_batches(path, ["id", "content_hash", "split", "prompt_chars"]):
            mask = pc.equal(batch["split"], "heldout")
            if not prompts:
                mask = pc.and_(mask, pc.equal(batch["prompt_chars"], 0))
            numbers = pc.indices_nonzero(mask)
            for number, row in zip(numbers.to_pylist(), batch.take(numbers).to_pylist(), strict=True):
                yield row["content_hash"], row["id"], path, first + number
            first += batch.num_rows


def _read(tickets: Iterable[Ticket]) -> Iterator[HeldoutDocument]:
    """Yields the documents of the tickets, in the order of files and rows."""
    columns = list(HeldoutDocument.__annotations__)
    for path, drawn in groupby(sorted(tickets, key=lambda ticket: ticket[2:]), key=lambda ticket: ticket[2]):
        yield from rows_at(path, [ticket[3] for ticket in drawn], columns)
