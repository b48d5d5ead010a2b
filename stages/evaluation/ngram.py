"""Byte n-gram model with interpolated, modified Kneser-Ney smoothing, a baseline of language modelling.

Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998. The vocabulary is the 256
bytes. A document starts after `order - 1` boundary bytes, 0xFF, which no UTF-8 text contains. No end of a document is
counted or predicted, so the probability of a text is that of all documents which begin with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pipeline.core.bounds import Range

if TYPE_CHECKING:
    import numpy as np

    Integers = np.ndarray[Any, np.dtype[np.uint64]]
    Counts = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

# An n-gram is one 64-bit number, so it has at most eight bytes.
Order = Annotated[int, Range(1, 8)]
BOUNDARY = 0xFF
# Bytes of training text that are counted at once.
BLOCK = 2**22
# Discounts of the counts one, two, and three or more where there are too few n-grams to estimate them.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """The n-grams of one length.

    Attributes:
        grams: The n-grams in ascending order, uint64; the last byte is the predicted one.
        discounted: Discounted relative frequency of each n-gram after its context.
        contexts: The contexts in ascending order, uint64.
        backoff: Probability that each context leaves to the next shorter one.
    """

    grams: Integers
    discounted: Floats
    contexts: Integers
    backoff: Floats


@dataclass(frozen=True)
class KneserNey:
    """A byte n-gram model.

    It holds 16 bytes of memory for each distinct n-gram of each length up to `order`, and 16 for each distinct context:
    26, 130 and 630 MiB in all for 1, 10 and 100 MB of Python source at order 8, and 5, 19 and 73 MiB at order 5.
    Fitting holds at most twice as much and 200 MiB for a block. 100 MB took 11 seconds at order 8.

    Attributes:
        levels: The n-grams of each length, the shortest first.
    """

    levels: tuple[Level, ...]

    @classmethod
    def fit(cls, documents: Iterable[bytes], order: int = 8) -> KneserNey:
        """Returns the model of order `order` of some documents; the order of the documents changes nothing."""
        import numpy as np

        grams, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        for block in _blocks(documents, order):
            # A window that ends in a boundary predicts nothing.
            windows = _windows(block, order)[np.frombuffer(block, np.uint8)[order - 1 :] != BOUNDARY]
            new, new_counts = np.unique(windows, return_counts=True)
            grams, place = np.unique(np.concatenate([grams, new]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, new_counts]), len(grams)).astype(np.int64)
        levels = []
        for length in range(order, 0, -1):
            levels.append(_level(grams, counts))
            # A shorter n-gram counts once for each distinct byte that precedes it.
            grams, counts = np.unique(grams & _mask(length - 1), return_counts=True)
        return cls(tuple(reversed(levels)))

    def bits(self, document: bytes, context: bytes = b"") -> float:
        """Returns minus log2 of the probability of a document's bytes.

        Args:
            document: The bytes to score.
            context: The bytes of the document before them, which are not scored.
        """
        return math.fsum(-math.log2(value) for value in self.probabilities(document, context))

    def probabilities(self, document: bytes, context: bytes = b"") -> list[float]:
        """Returns the probability of each byte of a document after the bytes before it."""
        import numpy as np

        order = len(self.levels)
        text = bytes([BOUNDARY]) * (order - 1) + context + document
        windows = _windows(text, order)[len(context) :]
        values = np.full(len(windows), 1 / 256)
        for length, level in enumerate(self.levels, 1):
            grams = windows & _mask(length)
            backoff = _find(level.contexts, level.backoff, grams >> np.uint64(8), 1.0)
            values = _find(level.grams, level.discounted, grams, 0.0) + backoff * values
        return values.tolist()


def _blocks(documents: Iterable[bytes], order: int) -> Iterator[bytes]:
    """Yields the documents in blocks of about BLOCK bytes, each document after its boundary."""
    boundary, block = bytes([BOUNDARY]) * (order - 1), bytearray()
    for document in documents:
        block += boundary + document
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _windows(text: bytes, order: int) -> Integers:
    """Returns every `order` successive bytes of a text as one number, the first byte as the most significant."""
    import numpy as np

    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    windows = np.zeros(max(0, len(codes) - order + 1), np.uint64)
    for place in range(order):
        windows = windows << np.uint64(8) | codes[place : place + len(windows)]
    return windows


def _mask(length: int) -> np.uint64:
    """Returns the mask of the last `length` bytes of an n-gram."""
    import numpy as np

    return np.uint64(2 ** (8 * length) - 1)


def _level(grams: Integers, counts: Counts) -> Level:
    """Returns the smoothed n-grams of one length."""
    import numpy as np

    discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
    contexts, place = np.unique(grams >> np.uint64(8), return_inverse=True)
    totals = np.bincount(place, counts, len(contexts))
    backoff = np.bincount(place, discounts, len(contexts)) / totals
    return Level(grams, (counts - discounts) / totals[place], contexts, backoff)


def _discounts(counts: Counts) -> tuple[float, float, float]:
    """Returns the discounts of the counts one, two, and three or more (Chen and Goodman, equation 26)."""
    import numpy as np

    one, two, three, four = (int(np.count_nonzero(counts == count)) for count in range(1, 5))
    if not (one and two and three):
        return FALLBACK_DISCOUNTS
    ratio = one / (one + 2 * two)
    estimates = (1 - 2 * ratio * two / one, 2 - 3 * ratio * three / two, 3 - 4 * ratio * four / three)
    within = all(0 < estimate < count for count, estimate in enumerate(estimates, 1))
    return estimates if within else FALLBACK_DISCOUNTS


def _find(keys: Integers, values: Floats, wanted: Integers, absent: float) -> Floats:
    """Returns the value of each wanted key, and `absent` for a key that is not there."""
    import numpy as np

    if not len(keys):
        return np.full(len(wanted), absent)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], absent)
