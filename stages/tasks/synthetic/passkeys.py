"""Procedural documents that hide a passkey: real text of a drawn length, a key in it, and the question at the end.

    …text… The pass key is 4821. …text… The pass key is 4821

The answer requires retrieving the key at any distance (Mohtashami and Jaggi 2023, arXiv 2305.16300). Everything except
the answer is context without loss: the text is a distractor, and the key itself cannot be predicted.

No digit occurs twice in a key, so that each digit determines the next; a model of two layers finds that rule within
minutes. A fixed tenth of all keys is reserved for evaluation and never occurs in training data. Keys should have six
digits or more: a model memorizes the few training keys of four digits (docs/lab-log.md).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence

STATEMENT = "\nThe pass key is {}.\n"
QUESTION = "\nThe pass key is"
ANSWER = " {}"
# Share of all keys that only evaluation uses.
EVALUATION_SHARE = 0.1
# Share of texts, by content hash, that are never filler in training: those that a data recipe may hold out.
HELD_OUT_SHARE = 0.1


def is_for_evaluation(key: str) -> bool:
    """Returns True if a key is reserved for evaluation, by its SHA-256, equally for every seed."""
    return _fraction(key) < EVALUATION_SHARE


def draw_key(rng: random.Random, digits: int, evaluation: bool = False) -> str:
    """Returns a key of `digits` different digits (2 to 9), of those for evaluation or of the others."""
    while True:
        # Rejection: nine of ten keys are for training, so few draws are needed.
        key = "".join(rng.sample("0123456789", digits))
        if is_for_evaluation(key) == evaluation:
            return key


def min_characters(digits: int) -> int:
    """Returns the number of characters of a document without any filler."""
    return len(STATEMENT.format("0" * digits)) + len(QUESTION) + len(ANSWER.format("0" * digits))


def fillers(texts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the (text, place) pairs that training may use: without those that a data recipe may hold out."""
    return [(text, place) for text, place in texts if _fraction(text) >= HELD_OUT_SHARE]


def draw(
    texts: Sequence[tuple[str, str]], count: int, chars: tuple[int, int], digits: int, rng: random.Random
) -> Iterator[tuple[str, int, str]]:
    """Draws `count` documents as (text, characters without loss, place of the first filler text).

    The key is before a line or a word, at a uniformly drawn depth.

    Args:
        texts: (text, place) pairs, not empty, that filler is cut from: neighbors in order, from a drawn one on.
        count: Number of documents.
        chars: Least and most characters of a document, drawn log-uniformly: as many from 100 to 200 as from 1000 to
            2000. A document may be two shorter, see `cut_filler`.
        digits: Digits of a key.
        rng: The source of randomness.
    """
    for _ in range(count):
        size = draw_size(chars, rng)
        start = rng.randrange(len(texts))
        depth = rng.random()
        key = draw_key(rng, digits)

        filler = cut_filler(texts, start, size - min_characters(digits))
        # A key in the middle of a word would be easy to find.
        cut = word_start(filler, round(depth * len(filler)))
        prompt = filler[:cut] + STATEMENT.format(key) + filler[cut:] + QUESTION
        yield prompt + ANSWER.format(key), len(prompt), texts[start][1]


def draw_size(chars: tuple[int, int], rng: random.Random) -> int:
    """Returns a number of characters for a document, log-uniform from least to most."""
    low, high = chars
    # With high + 1 the largest number can be drawn as well; rounding must not pass it.
    return min(high, int(low * math.exp(rng.random() * math.log((high + 1) / low))))


def word_start(filler: str, offset: int) -> int:
    """Returns the last start of a line or a word up to an offset; the end of the filler is one."""
    if offset >= len(filler):
        return offset
    return max(filler.rfind("\n", 0, offset), filler.rfind(" ", 0, offset)) + 1


def cut_filler(texts: Sequence[tuple[str, str]], start: int, size: int) -> str:
    """Returns `size` characters of texts in order from `start` on, with an empty line between them; the last is cut.

    Where a text ends one or two characters before `size`, the result ends with it.
    """
    parts: list[str] = []
    remaining, number = size, start
    while remaining > 0:
        parts.append(texts[number % len(texts)][0][:remaining])
        # The empty line between two texts takes two characters.
        remaining -= len(parts[-1]) + 2
        number += 1
    return "\n\n".join(parts)[:size]


def _fraction(text: str) -> float:
    """Returns the text's SHA-256 as a number from 0 to 1, as curation's held-out split reads it."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
