"""MinHash: words, shingles and signatures equal datatrove's; components are found for addresses of any size."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import simplify_text

from stages.data.curate.minhash import PRIME, band_hashes, components, jaccard, shingle_sets, signatures, simplify
from stages.data.curate.settings import MinHash
from stages.data.curate.words import WORDS

NUMBERS = "1, 2.50 and 1,234,567.8 and 1.2.3.4 or 3.. 4 at 10:15; 12٫5, ٣٤.٥ and 1\u03012"
LETTERS = "Éclair naïve İstanbul ΌΣΟΣ Σ. ﬁne Ångström x² 한글 \u037e \u1fef ÅÄÖ \u0344 a\u0301b"
SPACES = "tabs\tand\nlines\r\n\x0b\x0c\x1c\x85\u2000\u2028 \xa0 \x00\x01\xad\u200b end_of-line “quoted” — it's"


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pool = "aB1 .,;٫٣0İΣσΟ\u0301\u0344\u037e\u2000\u00a0éÅ한글ﬁ²½¼_-'’\u2024\u302e\U0001d165ⅷ９ａ\x00\x01\x1c\x85\u200b\xad\u06dd\u0660\U00016137"
    texts = ["".join(rng.choice(pool) for _ in range(rng.randrange(40))) for _ in range(count)]
    for _ in range(count):
        points = [rng.randrange(rng.choice([0x250, 0x3000, 0x110000])) for _ in range(20)]
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts


def english_texts(count: int) -> list[str]:
    """Texts of 0 to 400 words, some with signs, numbers and letters outside ASCII."""
    rng = random.Random(1)
    vocabulary = ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randrange(1, 9))) for _ in range(2000)]
    vocabulary += [*NUMBERS.split(), *LETTERS.split(), "don't", "end.", "(so)", "3,000", "\n"]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(rng.choice([8, 400])))) for _ in range(count)]


def test_simplified_words_are_those_of_datatrove() -> None:
    texts = [NUMBERS, LETTERS, SPACES, "", *random_texts(3000), *english_texts(50)]
    expected = [WORDS.word_tokenize(simplify_text(text)) for text in texts]
    assert [WORDS.word_tokenize(text) for text in simplify(texts)] == expected


@pytest.mark.parametrize("settings", [MinHash(), MinHash(n_grams=1, num_buckets=3, hashes_per_bucket=1)])
def test_bands_agree_exactly_where_signatures_do(settings: MinHash) -> None:
    texts = english_texts(300)
    texts += [text.rpartition(" ")[0] + " end" for text in texts]
    config = MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.num_buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=7,
        hash_config=HashConfig(precision=64),
    )
    signer = MinhashDedupSignature("memory://", config=config, language=WORDS)
    shingles = [signer.get_shingles(text) for text in texts]
    bands, short = band_hashes(texts, settings, 7 + 2**32)  # datatrove's seeds have 32 bits
    assert short.tolist() == [each.size == 0 for each in shingles] and 0 < short.sum() < len(texts)
    by_hash: list[dict[int, set[tuple[int, ...]]]] = [defaultdict(set) for _ in range(settings.num_buckets)]
    by_signature: list[dict[tuple[int, ...], set[int]]] = [defaultdict(set) for _ in range(settings.num_buckets)]
    for n, each in enumerate(shingles):
        for band, values in enumerate(signer.get_signature(each) if each.size else ()):
            by_hash[band][int(bands[n, band])].add(tuple(values))
            by_signature[band][tuple(values)].add(int(bands[n, band]))
    assert all(len(values) == 1 for tables in (by_hash, by_signature) for table in tables for values in table.values())
    assert any(len(table) < len(texts) - short.sum() for table in by_signature), "some texts share a band"
    expected = [np.unique(each) for each in shingles]
    assert all(np.array_equal(a, b) for a, b in zip(expected, shingle_sets(texts, settings.n_grams), strict=True))


def test_signatures_are_exact_where_the_sum_of_their_parts_passes_the_prime() -> None:
    signer = MinhashDedupSignature(
        "memory://", config=MinhashConfig(num_buckets=14, seed=3, hash_config=HashConfig(precision=64)), language=WORDS
    )
    a, b = signer.parameters
    odd = int(np.flatnonzero(a[0] & np.uint64(1))[0])
    inverse = pow(int(a[0, odd]), -1, 2**64)
    hard = [PRIME - 9, PRIME - 1, PRIME, PRIME + 1, 2 * PRIME, 2**64 - 1, 2**64 - 2**61, 2**64 - 9, 0, 7, 8, 9]
    values = [(x - int(b[0, odd])) * inverse % 2**64 for x in hard]  # each has one of these as a s + b
    rng = random.Random(0)
    texts = [[value, *(rng.getrandbits(64) for _ in range(5))] for value in values]
    expected = [signer.get_signature(np.array(each, np.uint64).reshape(-1, 1)) for each in texts]
    signed = signatures(np.array(texts, np.uint64).ravel(), np.full(len(texts), 6), 112, 3)
    assert np.array_equal(signed, np.array(expected).reshape(len(texts), -1))


def test_jaccard_index() -> None:
    first, second = np.array([1, 2, 3], np.uint64), np.array([2, 3, 4, 2**64 - 1], np.uint64)
    assert jaccard(first, second) == 2 / 5 and jaccard(first, first) == 1 and jaccard(first, second[3:]) == 0


@pytest.mark.parametrize("batch", [1, 7, 10_000])
def test_components_of_addresses_beyond_31_bits(batch: int) -> None:
    """Random stars, against a search through the graph; whatever the batches, a node's root is its first neighbor."""
    rng = random.Random(batch)
    addresses = sorted(rng.sample(range(2**31, 2**62), 3000))
    edges = [(rng.choice(addresses), rng.choice(addresses)) for _ in range(1600)]
    nodes = np.array(sorted({address for edge in edges for address in edge}))
    pieces = [np.array(edges[start : start + batch]) for start in range(0, len(edges), batch)]
    parent = components(nodes, [(piece[:, 0], piece[:, 1]) for piece in pieces])
    neighbors: dict[int, set[int]] = defaultdict(set)
    for a, b in edges:
        neighbors[a].add(b)
        neighbors[b].add(a)
    first: dict[int, int] = {}
    for node in nodes.tolist():
        todo = [] if node in first else [node]
        while todo:
            if (reached := todo.pop()) not in first:
                first[reached] = node
                todo += neighbors[reached]
    assert {node: int(nodes[root]) for node, root in zip(nodes.tolist(), parent, strict=True)} == first


def test_a_long_chain_is_one_component() -> None:
    nodes = np.arange(5000) * 2**40
    order = np.random.RandomState(0).permutation(4999)
    parent = components(nodes, [(nodes[place : place + 1], nodes[place + 1 : place + 2]) for place in order])
    assert not parent.any()
    assert not len(components(np.empty(0, np.int64), []))
