"""Bits per byte of held-out documents, which are comparable between models with different tokenizers.

The measure is minus log2 p(document) over its bytes. A part without loss in training, such as the question of a
problem, is only context here as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from stages.data.table import Double, Int32, Int64, String, columns_of
from stages.data.tokenizer import END
from stages.evaluation.heldout import HeldoutDocument

if TYPE_CHECKING:
    import torch

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


def first_token_bits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    """(vocab) bits of every token after a lone end-of-document token: the context of a document's first token."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.convert_tokens_to_ids(END)]])).logits[0, -1]
    return -torch.log_softmax(logits.double(), -1) / math.log(2)


def scored_documents(documents: Sequence[DocumentScore]) -> list[DocumentScore]:
    """The documents of which something was scored; all others are questions as long as the model's context. Raises
    AtomError if a source has fewer than two."""
    scored = [row for row in documents if row["bytes"]]
    counts = Counter(row["source"] for row in scored)
    if few := next((row["source"] for row in documents if counts[row["source"]] < 2), None):
        raise AtomError(f"evaluate: source {few} has fewer than two documents to score; hold out more")
    return scored


def document_bits(
    model: Any, tokenizer: Any, first_token_bits: torch.Tensor, row: HeldoutDocument, chat: bool = False
) -> DocumentScore:
    """Bits and bytes of one document, cut to the model's context.

    A question, the first `prompt_chars` characters, is context and is not scored, because it carries no loss in
    training; it is tokenized separately, as in training. Documents start a row in training, without a preceding token,
    so the first token of a document without a question is scored after a lone end-of-document token, and all others in
    the context of training. By the chain rule this is a proper probability of the text that covers every byte.
    """
    import torch

    prompt = token_ids(tokenizer, row["text"][: row["prompt_chars"]], chat)
    ids = (prompt + token_ids(tokenizer, row["text"][row["prompt_chars"] :], chat))[
        : model.config.max_position_embeddings
    ]
    scored = ids[len(prompt) :]
    bits = float(first_token_bits[ids[0]]) if scored and not prompt else 0.0
    start = max(len(prompt), 1)
    if len(ids) > start:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(tokens).logits[0, start - 1 : -1]
        log_probs = torch.log_softmax(logits.double(), -1).gather(1, tokens[0, start:, None])
        bits -= float(log_probs.sum()) / math.log(2)
    return {
        "source": row["source"],
        "id": row["id"],
        "bytes": token_bytes(tokenizer, scored),
        "tokens": len(scored),
        "nll_bits": bits,
    }


def token_ids(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """The tokens of a document; the name of a special token inside the text is plain text, as in training, unless the
    document is a conversation in the release's template."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not chat
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    return ids


def token_bytes(tokenizer: Any, ids: list[int]) -> int:
    """Bytes that tokens of a byte-level vocabulary stand for: one character of the byte alphabet is one byte.

    A cut in the middle of a multi-byte character is counted exactly; decoding would insert a replacement character.
    """
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
