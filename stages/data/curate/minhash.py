"""Near duplicates by MinHash: signatures equal to datatrove's, and the components of documents that share a band."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stages.data.curate.settings import MinHash
from stages.data.curate.shingles import batches, shingles

UInts = NDArray[np.uint64]
Ints = NDArray[np.int64]

PRIME = 2**61 - 1


def band_hashes(texts: list[str], settings: MinHash, seed: int) -> tuple[UInts, NDArray[np.bool_]]:
    """A 64-bit hash of each bucket of each text's MinHash signature, shape [texts, num_buckets], and whether the text
    is shorter than one n-gram (then its hashes are 0 and mean nothing).

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
    """The MinHash signatures of texts, shape [texts, count], from the shingles of one text after the other.

    sizes: shingles of each text, at least 1. The k-th hash of a shingle s is ((a_k s + b_k) mod 2^64) mod (2^61 - 1). A
    remainder takes a division, so this adds the three highest bits to the others instead, one too many. That is wrong
    only if the sum passes 2^61; then it is at most 8, and such a text is computed again by division.
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
    for n in np.flatnonzero((result <= 8).any(axis=0)).tolist():
        shingles_of_text = values[starts[n] : starts[n] + sizes[n], None]
        result[:, n] = ((shingles_of_text * a + b) % np.uint64(PRIME)).min(axis=0) + np.uint64(1)
    return (result - np.uint64(1)).T


@lru_cache
def _permutations(count: int, seed: int) -> tuple[UInts, UInts]:
    """The a and b of each hash, as datatrove draws them; numpy keeps this generator's stream fixed."""
    generator = np.random.RandomState(seed)
    return (
        generator.randint(1, PRIME, dtype=np.uint64, size=count),
        generator.randint(0, PRIME, dtype=np.uint64, size=count),
    )


def _combine(signed: UInts) -> UInts:
    """One 64-bit hash along the last axis."""
    result = np.zeros(signed.shape[:-1], np.uint64)
    for k in range(signed.shape[-1]):
        result = (result ^ signed[..., k]) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return result


def components(nodes: Ints, edges: Iterable[tuple[Ints, Ints]]) -> Ints:
    """For each node, the place of the first node that edges connect it with, by union-find.

    nodes: sorted addresses, of any size, of all documents that have an edge; edges: pairs of addresses, a batch at a
    time. Memory: 8 bytes a node beside `nodes`, and the batches.
    """
    parent = np.arange(len(nodes))
    for a, b in edges:
        ends = np.concatenate([_find(parent, np.searchsorted(nodes, a)), _find(parent, np.searchsorted(nodes, b))])
        roots, place = np.unique(ends, return_inverse=True)
        left, right = place[: len(a)], place[len(a) :]
        graph = coo_array((np.ones(len(a), np.bool_), (left, right)), shape=(len(roots), len(roots)))
        _, labels = connected_components(graph, directed=False)
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        parent[roots] = roots[first][inverse]
    for start in range(0, len(nodes), 2**20):
        _find(parent, np.arange(start, min(start + 2**20, len(nodes))))
    return parent


def _find(parent: Ints, places: Ints) -> Ints:
    """The roots of nodes, which become their parents."""
    roots, above = places, parent[places]
    while not np.array_equal(roots, above):
        roots, above = above, parent[above]
    parent[places] = roots
    return roots
