"""Repeated n-grams of words (Rae et al. 2021, table A1), counted on arrays of 64-bit hashes.

The values are those of datatrove's definition, which compares strings: equal strings have equal hashes, so a hash that
occurs once is an n-gram that occurs once, and only the others are compared as strings. Most documents have few of them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stages.data.curate.words import HASH_BASE, Words

Hashes = NDArray[np.uint64]

_ORDER = np.uint64(0xD6E8FEB86659FD93)  # odd: makes the hash of a sequence depend on its order
# HASH_BASE to the powers 0 to 256.
_POWERS = np.multiply.accumulate(np.full(257, HASH_BASE, np.uint64)) * np.uint64(pow(HASH_BASE, -1, 2**64))
_SLOT_BITS = 13  # leading bits of a hash, by which `_candidates` selects n-grams


def duplicates(parts: list[str]) -> tuple[int, int]:
    """Returns the number of parts, such as lines, that are equal to one before, and their characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


class NGrams:
    """The n-grams of the words of a document."""

    def __init__(self, words: Words) -> None:
        self._words = words
        # The last results of `_sequence_hashes` and `_joined_hashes`, each after its n.
        self._sequences = 1, words.hashes
        self._joined = 1, words.hashes, self._shifts
        # Characters of the longest word.
        self._longest = int(words.lengths.max(initial=0))
        # (n, an upper bound of the occurrences of any n-gram), from the last call of `most_frequent`.
        self._top = 1, len(words)

    @cached_property
    def _shifts(self) -> Hashes:
        """HASH_BASE to the power of the length of each word."""
        lengths = self._words.lengths
        if int(lengths.max(initial=0)) < len(_POWERS):
            return _POWERS[lengths]
        return np.array([pow(HASH_BASE, length, 2**64) for length in lengths.tolist()], np.uint64)

    def _sequence_hashes(self, n: int) -> Hashes:
        """Returns a hash of each n-gram as a sequence of words, made from the last result if that has a smaller n."""
        start, hashes = self._sequences
        if start > n:
            start, hashes = 1, self._words.hashes
        for length in range(start + 1, n + 1):
            hashes = hashes[:-1] * _ORDER + self._words.hashes[length - 1 :]
        self._sequences = n, hashes
        return hashes

    def _joined_hashes(self, n: int) -> Hashes:
        """Returns a hash of each n-gram as one string without spaces, made as in `_sequence_hashes`."""
        # `shifts` is HASH_BASE to the power of the length of each string.
        start, hashes, shifts = self._joined
        if start > n:
            start, hashes, shifts = 1, self._words.hashes, self._shifts
        for length in range(start + 1, n + 1):
            hashes = hashes[:-1] + shifts[:-1] * self._words.hashes[length - 1 :]
            shifts = shifts[:-1] * self._shifts[length - 1 :]
        self._joined = n, hashes, shifts
        return hashes

    def most_frequent(self, n: int, min_count: int = 1, above: float = -1.0) -> int:
        """Returns the characters of the most frequent n-gram, written with spaces, times its number of occurrences.

        Of several that are as frequent, it is the first in the text. The result is 0 if it occurs less than `min_count`
        times, and may be 0 if the value cannot be above `above`.

        In a document of w words, two different n-grams have the same hash with a probability of about w^2 / 2^65.
        """
        words = self._words.words
        if len(words) < n:
            return 0
        shorter, frequency = self._top
        # An n-gram is at most as frequent as one of fewer words, so most documents stop here.
        if shorter < n and (frequency < min_count or frequency * (n * self._longest + n - 1) <= above):
            return 0
        hashes = self._sequence_hashes(n)
        # Runs of equal hashes in the sorted array are the occurrences of one n-gram; `ends` are their last positions.
        ordered = np.sort(hashes)
        ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
        counts = ends.copy()
        counts[1:] -= ends[:-1]
        counts[0] += 1
        max_count = int(counts.max())
        self._top = n, max_count
        if max_count < min_count:
            return 0
        if max_count == 1:
            return len(" ".join(words[:n]))

        frequent_hashes = ordered[ends[counts == max_count]]
        wanted = set(frequent_hashes.tolist())
        candidates = _candidates(hashes, frequent_hashes)
        first = next(position for position in candidates if int(hashes[position]) in wanted)
        return len(" ".join(words[first : first + n])) * max_count

    def repeated(self, n: int) -> int:
        """Returns the number of characters in n-grams that occurred before, from left to right and without overlap.

        n-grams are compared as strings without spaces.
        """
        words = self._words.words
        if len(words) <= n:
            return 0
        hashes = self._joined_hashes(n)
        ordered = np.sort(hashes)
        repeated_hashes = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(repeated_hashes):
            return 0

        seen: set[str] = set()
        characters = counted_until = 0
        for position in _candidates(hashes, repeated_hashes):
            # An n-gram that overlaps a counted one does not count.
            if position < counted_until:
                continue
            joined = "".join(words[position : position + n])
            if joined in seen:
                characters += len(joined)
                counted_until = position + n
            else:
                seen.add(joined)
        return characters


def _candidates(hashes: Hashes, wanted: Hashes) -> list[int]:
    """Returns the positions of all wanted hashes, and of a few others with the same leading bits, in order."""
    is_wanted = np.zeros(2**_SLOT_BITS, bool)
    shift = np.uint64(64 - _SLOT_BITS)
    is_wanted[wanted >> shift] = True
    positions: list[int] = np.flatnonzero(is_wanted[hashes >> shift]).tolist()
    return positions
