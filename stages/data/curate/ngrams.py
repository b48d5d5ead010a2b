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
_SLOTS = 13  # bits of a hash that select an n-gram for comparison


def duplicates(parts: list[str]) -> tuple[int, int]:
    """Returns the number of parts, such as lines, that are equal to one before, and their characters."""
    seen = set(parts)
    if len(seen) == len(parts):
        return 0, 0
    return len(parts) - len(seen), sum(map(len, parts)) - sum(map(len, seen))


class NGrams:
    """The n-grams of the words of a document."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._sequences = 1, words.hashes
        self._joined = 1, words.hashes, self._shifts
        self._longest = int(words.lengths.max(initial=0))
        self._top = 1, len(words)

    @cached_property
    def _shifts(self) -> Hashes:
        """HASH_BASE to the power of the length of each word."""
        lengths = self._words.lengths
        if int(lengths.max(initial=0)) < len(_POWERS):
            return _POWERS[lengths]
        return np.array([pow(HASH_BASE, length, 2**64) for length in lengths.tolist()], np.uint64)

    def _sequence_hashes(self, n: int) -> Hashes:
        """Returns a hash of each n-gram as a sequence of words.

        The last ones are kept: the next n follows from them.
        """
        known, hashes = self._sequences if self._sequences[0] <= n else (1, self._words.hashes)
        for length in range(known + 1, n + 1):
            hashes = hashes[:-1] * _ORDER + self._words.hashes[length - 1 :]
        self._sequences = n, hashes
        return hashes

    def _joined_hashes(self, n: int) -> Hashes:
        """Returns a hash of each n-gram as one string without spaces.

        The last ones are kept, with HASH_BASE to the power of the length of each string.
        """
        known, hashes, shifts = self._joined if self._joined[0] <= n else (1, self._words.hashes, self._shifts)
        for length in range(known + 1, n + 1):
            hashes = hashes[:-1] + shifts[:-1] * self._words.hashes[length - 1 :]
            shifts = shifts[:-1] * self._shifts[length - 1 :]
        self._joined = n, hashes, shifts
        return hashes

    def most_frequent(self, n: int, min_count: int = 1, above: float = -1.0) -> int:
        """Returns the characters of the most frequent n-gram, written with spaces, times its number of occurrences.

        The first in the text counts where several are as frequent. 0 if it occurs less than `min_count` times,
        or where the value can not be above `above`: an n-gram is at most as frequent as one of fewer words.

        Different n-grams of a document have the same hash with a probability of about its words squared by 2^65.
        """
        words = self._words.words
        if len(words) < n:
            return 0
        shorter, frequency = self._top
        # The most frequent n-gram of fewer words bounds this one, so most documents stop here.
        if shorter < n and (frequency < min_count or frequency * (n * self._longest + n - 1) <= above):
            return 0
        hashes = self._sequence_hashes(n)
        ordered = np.sort(hashes)
        ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
        counts = ends.copy()
        counts[1:] -= ends[:-1]
        counts[0] += 1
        # Runs of equal hashes in the sorted array are the occurrences of one n-gram.
        count = int(counts.max())
        self._top = n, count
        if count < min_count:
            return 0
        if count == 1:
            return len(" ".join(words[:n]))
        frequent = ordered[ends[counts == count]]
        matching, wanted = _candidates(hashes, frequent), set(frequent.tolist())
        first = next(position for position in matching if int(hashes[position]) in wanted)
        return len(" ".join(words[first : first + n])) * count

    def repeated(self, n: int) -> int:
        """Returns the number of characters in n-grams that occurred before, from left to right and without overlap.

        n-grams are compared as strings without spaces.
        """
        words = self._words.words
        if len(words) <= n:
            return 0
        hashes = self._joined_hashes(n)
        ordered = np.sort(hashes)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(again):
            return 0
        seen: set[str] = set()
        characters = free = 0
        for position in _candidates(hashes, again):
            # An n-gram that overlaps a counted one does not count.
            if position < free:
                continue
            joined = "".join(words[position : position + n])
            if joined in seen:
                characters += len(joined)
                free = position + n
            else:
                seen.add(joined)
        return characters


def _candidates(hashes: Hashes, wanted: Hashes) -> list[int]:
    """Returns the positions of all wanted hashes, in order, and of a few others."""
    slots = np.zeros(2**_SLOTS, bool)
    shift = np.uint64(64 - _SLOTS)
    slots[wanted >> shift] = True
    positions: list[int] = np.flatnonzero(slots[hashes >> shift]).tolist()
    return positions
