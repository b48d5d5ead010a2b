"""Near duplicates by MinHash: shingles, signatures equal to datatrove's, and components of documents that share a band.

Shingles are the hashed word n-grams by which near duplicates are compared, for many texts at once. Words and hashes are
those of datatrove: lower case, numbers become 0, no punctuation, no diacritics; XXH64 of the n words with a space
between two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION_TRANS, simplify_text
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh64_intdigest

from stages.data.curate.settings import MinHash
from stages.data.curate.words import split_words

_DECIMAL_SEPARATORS = "،٫⎖⎗⎘"  # of numbers in other scripts, beside the point and the comma
_DROPPED = "\0"
_ASCII_BREAK, _BREAK = "\xff", "\udfff"  # stand between texts, and in none: one is not ASCII, one is not UTF-8
_UNKNOWN, _BY_CONTEXT = 2**32 - 1, 2**32 - 2


# Characters of text that are worked on at once: their shingles stay in the processor's cache.
CHARACTERS = 2**16
_table = np.full(0x110000, _UNKNOWN, np.uint32)
UInts = NDArray[np.uint64]
Ints = NDArray[np.int64]
PRIME = 2**61 - 1


def batches(texts: list[str]) -> Iterator[slice]:
    """Yields the slices of texts that together have about CHARACTERS."""
    start = characters = 0
    for stop, text in enumerate(texts, start=1):
        characters += len(text)
        if characters >= CHARACTERS or stop == len(texts):
            yield slice(start, stop)
            start, characters = stop, 0


def shingle_sets(texts: list[str], n_grams: int) -> Iterator[NDArray[np.uint64]]:
    """Yields the shingles of each text, sorted and without repetitions."""
    for batch in batches(texts):
        values, sizes = shingles(texts[batch], n_grams)
        yield from map(np.unique, np.split(values, np.cumsum(sizes)[:-1]))


def shingles(texts: list[str], n_grams: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the hashes of the n-grams of each text, one text after the other, and how many each text has."""
    words = [split_words(text) for text in simplify(texts)]
    counts = np.array([len(each) for each in words], np.int64)
    joined = " ".join(chain.from_iterable(words)).encode()
    # The n-grams are slices of one string, so each is hashed without joining its words again.
    spaces = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord(" "))
    starts, ends = np.append(0, spaces + 1), np.append(spaces, len(joined))
    sizes = np.maximum(counts - n_grams + 1, 0)
    first = np.arange(sizes.sum()) + np.repeat((np.cumsum(counts) - counts) - (np.cumsum(sizes) - sizes), sizes)
    runs = zip(starts[first].tolist(), ends[first + n_grams - 1].tolist(), strict=True)
    return np.array([xxh64_intdigest(joined[start:end]) for start, end in runs], np.uint64), sizes


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Returns the Jaccard index of two sets of shingles, each sorted and without repetitions, and not both empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def simplify(texts: list[str]) -> list[str]:
    """Returns each text as datatrove's `simplify_text` gives it, but for the number of spaces between words."""
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
    # Each round halves the runs of zeros.
    while "00" in text:
        text = text.replace("00", "0")
    return text.replace("0.0", "0").replace(".", " ").replace(_DROPPED, "")


def _simplified(character: str) -> int:
    """Returns the code of the character that a lower-case character becomes.

    _BY_CONTEXT if that depends on its neighbors, or is several characters.
    """
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


_ASCII_TABLE = bytes(_simplified(chr(code).lower()) for code in range(128)) + bytes(range(128, 256))


def band_hashes(texts: list[str], settings: MinHash, seed: int) -> tuple[UInts, NDArray[np.bool_]]:
    """Returns a 64-bit hash of each bucket of each text's MinHash signature, and whether the text is short.

    The hashes have the shape [texts, num_buckets]. A short text has less than one n-gram; its hashes are 0 and mean
    nothing.

    Two texts share a hash exactly where their signatures in datatrove agree in that bucket.
    """
    hashes = np.zeros((len(texts), settings.num_buckets), np.uint64)
    short = np.ones(len(texts), np.bool_)
    for batch in batches(texts):
        values, sizes = shingles(texts[batch], settings.n_grams)
        long = batch.start + np.flatnonzero(sizes)
        if len(long):
            signed = signatures(values, sizes[sizes > 0], settings.num_buckets * settings.hashes_per_bucket, seed)
            hashes[long] = _combine(signed.reshape(len(long), settings.num_buckets, settings.hashes_per_bucket))
            short[long] = False
    return hashes, short


def signatures(values: UInts, sizes: Ints, count: int, seed: int) -> UInts:
    """Returns the MinHash signatures of texts, shape [texts, count].

    The k-th hash of a shingle s is ((a_k s + b_k) mod 2^64) mod (2^61 - 1). A remainder takes a division, so this adds
    the three highest bits to the others instead, one too many. That is wrong only if the sum passes 2^61; then it is at
    most 8, and such a text is computed again by division.

    Args:
        values: The shingles of one text after the other.
        sizes: The number of shingles of each text, at least 1.
        count: Hashes of a signature.
        seed: Seed of the hash functions.
    """
    a, b = _permutations(count, seed % 2**32)
    starts = np.cumsum(sizes) - sizes
    result = np.empty((count, len(sizes)), np.uint64)
    hashed, high = np.empty_like(values), np.empty_like(values)
    for k in range(count):
        np.multiply(values, a[k], out=hashed)
        np.add(hashed, b[k] + np.uint64(1), out=hashed)
        np.right_shift(hashed, np.uint64(61), out=high)
        np.add(hashed, high, out=hashed)
        np.bitwise_and(hashed, np.uint64(PRIME), out=hashed)
        np.minimum.reduceat(hashed, starts, out=result[k])
    # So rare that the slow way costs nothing: one hash in 2^58.
    for n in np.flatnonzero((result <= 8).any(axis=0)).tolist():
        shingles_of_text = values[starts[n] : starts[n] + sizes[n], None]
        result[:, n] = ((shingles_of_text * a + b) % np.uint64(PRIME)).min(axis=0) + np.uint64(1)
    return (result - np.uint64(1)).T


@lru_cache
def _permutations(count: int, seed: int) -> tuple[UInts, UInts]:
    """Returns the a and b of each hash, as datatrove draws them; numpy keeps this generator's stream fixed."""
    generator = np.random.RandomState(seed)
    return (
        generator.randint(1, PRIME, dtype=np.uint64, size=count),
        generator.randint(0, PRIME, dtype=np.uint64, size=count),
    )


def _combine(signed: UInts) -> UInts:
    """Returns one 64-bit hash along the last axis."""
    result = np.zeros(signed.shape[:-1], np.uint64)
    for k in range(signed.shape[-1]):
        result = (result ^ signed[..., k]) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return result


def components(nodes: Ints, edges: Iterable[tuple[Ints, Ints]]) -> Ints:
    """Returns for each node the place of the first node that edges connect it with, by union-find.

    Memory holds 8 bytes a node beside `nodes`, and the batches.

    Args:
        nodes: Sorted addresses, of any size, of all documents that have an edge.
        edges: Pairs of addresses, a batch at a time.
    """
    parent = np.arange(len(nodes))
    for a, b in edges:
        ends = np.concatenate([_find(parent, np.searchsorted(nodes, a)), _find(parent, np.searchsorted(nodes, b))])
        roots, place = np.unique(ends, return_inverse=True)
        left, right = place[: len(a)], place[len(a) :]
        graph = coo_array((np.ones(len(a), np.bool_), (left, right)), shape=(len(roots), len(roots)))
        _, labels = connected_components(graph, directed=False)
        # The root of a component is its first node, the smallest address.
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        parent[roots] = roots[first][inverse]
    # In pieces, so that temporary arrays stay small.
    for start in range(0, len(nodes), 2**20):
        _find(parent, np.arange(start, min(start + 2**20, len(nodes))))
    return parent


def _find(parent: Ints, places: Ints) -> Ints:
    """Returns the roots of nodes, which become their parents."""
    roots, above = places, parent[places]
    while not np.array_equal(roots, above):
        roots, above = above, parent[above]
    parent[places] = roots
    return roots
