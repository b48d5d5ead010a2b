"""Encode texts with tiktoken, with exactly the ids that the `tokenizers` library gives for the same tokenizer.json.

tiktoken is seven times as fast, but merges any two neighbors whose bytes together are a token, where `tokenizers`
follows the list of merges. Both give the same ids if every token is what its own bytes are encoded to. So this is
checked for each token before the first text, and a tokenizer for which it does not hold, or that is not of the kind
that stages/formats/tokenizer.py trains, is left to `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.formats.tokenizer import PATTERN, load_for_corpus, untrained

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    Ids = NDArray[np.int32]

BLOCK = 100_000
"""Characters. tiktoken's regular expressions fail on runs of a million blanks: a text with a block of blanks is left to
`tokenizers`."""


class Encoder:
    """Encodes texts with the tokenizer at `path`.

    special_tokens: the names of special tokens in a text are these tokens, as in conversations; else they are ordinary
    text. fast: whether tiktoken encodes.
    """

    def __init__(self, path: Path, special_tokens: bool = False) -> None:
        self.tokenizer = load_for_corpus(path)
        self._tiktoken = _tiktoken_encode(self.tokenizer, special_tokens)
        self.tokenizer.encode_special_tokens = not special_tokens

    @property
    def fast(self) -> bool:
        return self._tiktoken is not None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        encode = self._tiktoken
        if encode is None:
            return self.reference(texts)
        return [self.reference([text])[0] if has_blank_block(text) else encode(text) for text in texts]

    def reference(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text by `tokenizers`."""
        import numpy as np

        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def has_blank_block(text: str) -> bool:
    """Whether a block of the text is blank. A text without one has no run of 2 * BLOCK blanks."""
    return len(text) > BLOCK and any(text[start : start + BLOCK].isspace() for start in range(0, len(text), BLOCK))


def _tiktoken_encode(tokenizer: Tokenizer, special_tokens: bool) -> Callable[[str], Ids] | None:
    """A function that encodes a text with tiktoken; None if tiktoken cannot represent the tokenizer."""
    import numpy as np
    import tiktoken

    description = json.loads(tokenizer.to_str())
    specials = [token["content"] for token in description["added_tokens"]]
    merged = _merged_tokens(description, specials)
    if merged is None or not _merges_to_itself(tokenizer, merged):
        return None
    byte_of = _bytes_by_character()
    tokens = [*byte_of, *merged]
    # tiktoken's ranks are those of the merges, whatever the ids are
    ranks = {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(tokens)}
    special_ranks = {name: len(tokens) + n for n, name in enumerate(specials)}
    ids = np.array([*map(tokenizer.token_to_id, [*tokens, *specials])], np.int32)
    encoding = tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ranks)
    allowed = frozenset(specials if special_tokens else ())

    def encode(text: str) -> Ids:
        encoded: Ids = ids[encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())]
        return encoded

    return encode


def _merged_tokens(description: dict[str, Any], specials: Sequence[str]) -> list[str] | None:
    """The tokens that the merges make, in the order of the merges; None if the tokenizer is of another kind: other
    steps or options than that of an untrained one, tokens that no merge makes or several make, merges of tokens that
    come later, or special tokens that `tokenizers` does not simply look for."""
    model, kind = description["model"], json.loads(untrained().to_str())
    steps = ("truncation", "padding", "normalizer", "pre_tokenizer")
    options = [name for name in kind["model"] if name not in ("vocab", "merges")]
    same_kind = all(description[name] == kind[name] for name in steps)
    if not same_kind or any(model.get(name) != kind["model"][name] for name in options):
        return None
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    if any(plain.items() - token.items() for token in description["added_tokens"]):
        return None
    ordered = sorted(specials)
    if any(later.startswith(earlier) for earlier, later in pairwise(ordered)):
        return None
    merged = [first + second for first, second in model["merges"]]
    tokens = [*_bytes_by_character(), *merged]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or {*tokens, *specials} != {*model["vocab"], *specials} or {*tokens} & {*specials}:
        return None
    parts_come_earlier = all(
        max(ranks.get(first, len(ranks)), ranks.get(second, len(ranks))) < ranks[first + second]
        for first, second in model["merges"]
    )
    return merged if parts_come_earlier else None


def _merges_to_itself(tokenizer: Tokenizer, merged: Sequence[str]) -> bool:
    """Whether every token is what the merges make of its bytes."""
    tokenize = tokenizer.model.tokenize
    return all([piece.value for piece in tokenize(token)] == [token] for token in merged)


def _bytes_by_character() -> dict[str, int]:
    """{character that stands for a byte in a byte-level vocabulary: the byte}, as GPT-2 has it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
