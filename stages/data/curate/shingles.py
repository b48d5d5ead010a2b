"""Shingles: the hashed word n-grams by which near duplicates are compared, for many texts at once.

Words and hashes are those of datatrove's MinHash: lower case, numbers become 0, no punctuation, no diacritics; XXH64 of
the n words with a space between two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import chain

import numpy as np
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION_TRANS, simplify_text
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from stages.data.curate.words import split_words

_DECIMAL_SEPARATORS = "،٫⎖⎗⎘"  # of numbers in other scripts, beside the point and the comma
_DROPPED = "\0"
_ASCII_BREAK, _BREAK = "\xff", "\udfff"  # stand between texts, and in none: one is not ASCII, one is not UTF-8
_UNKNOWN, _BY_CONTEXT = 2**32 - 1, 2**32 - 2


CHARACTERS = 2**16
"""Characters of text that are worked on at once: their shingles stay in the processor's cache."""


def batches(texts: list[str]) -> Iterator[slice]:
    """The slices of texts that together have about CHARACTERS."""
    start = characters = 0
    for stop, text in enumerate(texts, start=1):
        characters += len(text)
        if characters >= CHARACTERS or stop == len(texts):
            yield slice(start, stop)
            start, characters = stop, 0


def shingle_sets(texts: list[str], n_grams: int) -> Iterator[NDArray[np.uint64]]:
    """The shingles of each text, sorted and without repetitions."""
    for batch in batches(texts):
        values, sizes = shingles(texts[batch], n_grams)
        yield from map(np.unique, np.split(values, np.cumsum(sizes)[:-1]))


def shingles(texts: list[str], n_grams: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of the n-grams of each text, one text after the other, and how many each text has."""
    words = [split_words(text) for text in simplify(texts)]
    counts = np.array([len(each) for each in words], np.int64)
    joined = " ".join(chain.from_iterable(words)).encode()
    spaces = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord(" "))
    starts, ends = np.append(0, spaces + 1), np.append(spaces, len(joined))
    sizes = np.maximum(counts - n_grams + 1, 0)
    first = np.arange(sizes.sum()) + np.repeat((np.cumsum(counts) - counts) - (np.cumsum(sizes) - sizes), sizes)
    runs = zip(starts[first].tolist(), ends[first + n_grams - 1].tolist(), strict=True)
    return np.array([xxh64_intdigest(joined[start:end]) for start, end in runs], np.uint64), sizes


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """The Jaccard index of two sets of shingles, each sorted and without repetitions, and not both empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def simplify(texts: list[str]) -> list[str]:
    """Each text as datatrove's `simplify_text` gives it, but for the number of spaces between words."""
    ascii_texts = [text for text in texts if text.isascii()]
    other_texts = [text for text in texts if not text.isascii()]
    simple = {True: iter(_simplify_ascii(ascii_texts)), False: iter(_simplify_any(other_texts))}
    return [next(simple[text.isascii()]) for text in texts]


def _simplify_ascii(texts: list[str]) -> list[str]:
    joined = _ASCII_BREAK.join(texts).encode("latin-1").translate(_ASCII_TABLE).decode("latin-1")
    return _without_numbers(joined).split(_ASCII_BREAK)


def _simplify_any(texts: list[str]) -> list[str]:
    joined = _BREAK.join(texts).lower().encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(joined, np.uint32)
    simple = _table[codes]
    if (new := simple == _UNKNOWN).any():
        for code in np.unique(codes[new]).tolist():
            _table[code] = _simplified(chr(code))
        simple = _table[codes]
    hard = np.flatnonzero(simple == _BY_CONTEXT)
    simple[hard] = ord(" ")
    results = _without_numbers(simple.tobytes().decode("utf-32-le", "surrogatepass")).split(_BREAK)
    if len(hard):
        breaks = np.flatnonzero(codes == ord(_BREAK))
        for number in np.unique(np.searchsorted(breaks, hard)).tolist():
            results[number] = simplify_text(texts[number])
    return results


def _without_numbers(text: str) -> str:
    """Makes each number, of digits 0 and at most one point inside, a single 0; then points become spaces."""
    while "00" in text:
        text = text.replace("00", "0")
    return text.replace("0.0", "0").replace(".", " ").replace(_DROPPED, "")


def _simplified(character: str) -> int:
    """The code of what becomes of a lower-case character; _BY_CONTEXT if that depends on its neighbors, or is several
    characters."""
    if character == _BREAK:
        return ord(_BREAK)
    if character in "0123456789":
        return ord("0")
    if character in ",.":
        return ord(".")
    if NUMBERS_PATTERN.match(character) or character in _DECIMAL_SEPARATORS:
        return _BY_CONTEXT
    if character.isspace() or character.translate(PUNCTUATION_TRANS) == " ":
        return ord(" ")
    letters = [part for part in unicodedata.normalize("NFD", character) if unicodedata.category(part) != "Mn"]
    if not letters:
        return ord(_DROPPED)
    if len(letters) > 1 or unicodedata.combining(letters[0]) or letters[0] in "0.":
        return _BY_CONTEXT
    return ord(letters[0])


_table = np.full(0x110000, _UNKNOWN, np.uint32)
_ASCII_TABLE = bytes(_simplified(chr(code).lower()) for code in range(128)) + bytes(range(128, 256))
