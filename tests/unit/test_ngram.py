"""The byte n-gram model: a proper distribution, the formulas of modified Kneser-Ney, and what it must beat."""

import math
import random
from collections import Counter, defaultdict

import pytest

from stages.evaluation import ngram
from stages.evaluation.ngram import KneserNey

WORDS = ["red", "green", "blue", "door", "window", "opens", "closes", "the", "a", "slowly"]


def sentences(count: int, seed: int) -> list[bytes]:
    random_words = random.Random(seed)
    return [" ".join(random_words.choices(WORDS, k=8)).encode() for _ in range(count)]


def letters(count: int, seed: int) -> list[bytes]:
    """Returns texts whose n-grams have all small counts, so that every discount is estimated."""
    weights = [1 / rank**1.5 for rank in range(1, 97)]
    return [bytes(random.Random(seed + number).choices(range(32, 128), weights, k=60)) for number in range(count)]


def reference(documents: list[bytes], order: int, context: bytes, byte: int) -> float:
    """Returns the probability of a byte by the recursion of Chen and Goodman, from dictionaries of whole contexts."""
    padded = [b"\xff" * (order - 1) + document for document in documents]
    counts = Counter(text[end - order : end] for text in padded for end in range(order, len(text) + 1))

    def probability(counts: dict[bytes, int], context: bytes) -> float:
        n1, n2, n3, n4 = (sum(1 for count in counts.values() if count == i) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        if not context:
            lower = 1 / 256
        else:
            preceding = defaultdict(set)
            for gram in counts:
                preceding[gram[1:]].add(gram[0])
            lower = probability({gram: len(bytes_before) for gram, bytes_before in preceding.items()}, context[1:])
        following = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        if not following:
            return lower
        count = counts.get(context + bytes([byte]), 0)
        left = sum(discounts[min(count, 3)] for count in following.values())
        return (count - discounts[min(count, 3)] + left * lower) / sum(following.values())

    return probability(dict(counts), (b"\xff" * (order - 1) + context)[len(context) :])


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_the_next_bytes_sum_to_one(order):
    model = KneserNey.fit(sentences(200, seed=0), order)

    for context in (b"", b"t", b"the red", b"never seen \xc3\xa9", b"zzzzzzzz"):
        total = math.fsum(2 ** -model.bits(bytes([byte]), context) for byte in range(256))
        assert total == pytest.approx(1, abs=1e-9)


def test_bytes_add_up_to_the_document():
    model = KneserNey.fit(sentences(50, seed=0))
    text = b"the red door opens"

    in_parts = model.bits(text[:7]) + model.bits(text[7:], context=text[:7])

    assert model.bits(text) == pytest.approx(in_parts)
    assert model.bits(b"", context=text) == 0


def test_it_is_the_recursion_of_the_paper(monkeypatch):
    monkeypatch.setattr(ngram, "FALLBACK_DISCOUNTS", None)  # too few n-grams would raise here
    documents = letters(30, seed=1)
    model = KneserNey.fit(documents, order=3)

    for context, byte in ((b"", b" "), (b" ", b"!"), (b'!"', b" "), (b"  ", b"z"), (b"zq", b" "), (b"! ", b"\x00")):
        expected = reference(documents, 3, context, byte[0])
        assert model.probabilities(byte, context) == [pytest.approx(expected, rel=1e-12)]


def test_a_bigram_by_hand():
    model = KneserNey.fit([b"ab", b"ab", b"ac"], order=2)

    # Too few n-grams for estimates: the discounts are 0.5, 1 and 1.5. After `a`: ab twice, ac once.
    # `a`, `b` and `c` each follow one distinct byte, so each has (1 - 0.5) / 3 + 1.5 / 3 / 256 after no context.
    unigram = 0.5 / 3 + 0.5 / 256
    assert model.probabilities(b"b", b"a") == [pytest.approx((2 - 1) / 3 + (1 + 0.5) / 3 * unigram)]
    assert model.probabilities(b"a") == [pytest.approx((3 - 1.5) / 3 + 1.5 / 3 * unigram)]


def test_a_longer_context_predicts_better():
    train, heldout = sentences(300, seed=2), b". ".join(sentences(20, seed=3))

    bits = [KneserNey.fit(train, order).bits(heldout) / len(heldout) for order in (1, 2, 5)]

    assert bits[0] > bits[1] > bits[2]
    assert 3.5 < bits[0] < 4.5  # the entropy of the letters of these words


def test_blocks_and_the_order_of_documents_change_nothing(monkeypatch):
    documents = sentences(40, seed=4)
    whole = KneserNey.fit(documents)
    monkeypatch.setattr(ngram, "BLOCK", 100)

    in_blocks = KneserNey.fit(reversed(documents))

    assert in_blocks.probabilities(b"the green door") == whole.probabilities(b"the green door")


def test_without_text_every_byte_is_equally_likely():
    assert KneserNey.fit([]).bits(b"ab") == 16
