"""Near duplicates by MinHash: shingles, signatures equal to datatrove's, and components of documents that share a band.

Shingles are the hashed word n-grams by which near duplicates are compared, for many texts at once. Words and hashes are
those of datatrove: lower case, numbers become 0, no punctuation, no diacritics; XXH64 of the n words with a space
between two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
from datatrove.utils.text import simplify_text
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh64_intdigest

from stages.data.curate.settings import MinHash
from stages.data.curate.words import split_words

# Characters of text that are worked on at once: their shingles stay in the processor's cache.
CHARACTERS = 2**16
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
    words = [split_words(simplify_text(text)) for text in texts]
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

    The k-th hash of a shingle s is ((a_k s + b_k) mod 2^64) mod (2^61 - 1).

    Args:
        values: The shingles of one text after the other.
        sizes: The number of shingles of each text, at least 1.
        count: Hashes of a signature.
        seed: Seed of the hash functions.
    """
    a, b = _permutations(count, seed % 2**32)
    starts = np.cumsum(sizes) - sizes
    result = np.empty((count, len(sizes)), np.uint64)
    for k in range(count):
        np.minimum.reduceat((values * a[k] + b[k]) % np.uint64(PRIME), starts, out=result[k])
    return result.T


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
