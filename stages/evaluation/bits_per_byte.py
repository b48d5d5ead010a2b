"""Bits per byte of held-out documents, which are comparable between models with different tokenizers.

The measure is minus log2 p(document) over its bytes. A part without loss in training, such as the question of a
problem, is only context here as well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from stages.evaluation.heldout import HeldoutDocument
from stages.formats.table import Double, Int32, Int64, String, columns_of
from stages.formats.tokenizer import for_corpus
from stages.generation.engine import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HeldoutLimit = Annotated[int, Range(2, 1e6)]
"""Maximum number of held-out documents of a source; two are needed for a standard error."""


class DocumentScore(TypedDict):
    """bytes, tokens: of the scored part; nll_bits: minus log2 of its probability."""

    source: String
    id: String
    bytes: Int64
    tokens: Int32
    nll_bits: Double


DOCUMENT_SCORES = columns_of(DocumentScore)


def scored_documents(documents: Sequence[DocumentScore]) -> list[DocumentScore]:
    """The documents of which something was scored; all others are questions as long as the model's context. Raises
    AtomError if a source has fewer than two."""
    scored = [row for row in documents if row["bytes"]]
    counts = Counter(row["source"] for row in scored)
    if few := next((row["source"] for row in documents if counts[row["source"]] < 2), None):
        raise AtomError(f"evaluate: source {few} has fewer than two documents to score; hold out more")
    return scored


def score_documents(
    model: LanguageModel, tokenizer: Any, documents: Sequence[HeldoutDocument], conversations: Sequence[str] = ()
) -> list[DocumentScore]:
    """Bits and bytes of each document, cut to the model's context. conversations: sources whose documents contain
    special tokens.

    A question, the first `prompt_chars` characters, is context and is not scored, because it carries no loss in
    training; it is tokenized separately, as in training. Documents start a row in training, without a preceding token,
    so the first token of a document without a question is scored after a lone end-of-document token, and all others in
    the context of training. By the chain rule this is a proper probability of the text that covers every byte.
    """
    rows = []
    for row in documents:
        chat = row["source"] in conversations
        prompt = token_ids(tokenizer, row["text"][: row["prompt_chars"]], chat)
        ids = prompt + token_ids(tokenizer, row["text"][row["prompt_chars"] :], chat)
        rows.append((ids[: model.context], len(prompt)))
    return [
        {
            "source": row["source"],
            "id": row["id"],
            "bytes": token_bytes(tokenizer, ids[start:]),
            "tokens": len(ids[start:]),
            "nll_bits": bits,
        }
        for row, (ids, start), bits in zip(documents, rows, model.bits(rows), strict=True)
    ]


def token_ids(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """The tokens of a document; the name of a special token inside the text is plain text, as in training, unless the
    document is a conversation in the release's template."""
    backend = tokenizer.backend_tokenizer if chat else _corpus_tokenizer(tokenizer)
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


@lru_cache(maxsize=1)
def _corpus_tokenizer(tokenizer: Any) -> Tokenizer:
    return for_corpus(json.loads(tokenizer.backend_tokenizer.to_str()))


def token_bytes(tokenizer: Any, ids: list[int]) -> int:
    """Bytes that tokens of a byte-level vocabulary stand for: one character of the byte alphabet is one byte.

    A cut in the middle of a multi-byte character is counted exactly; decoding would insert a replacement character.
    """
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
