"""Counts distinct documents in a bit for each."""

from __future__ import annotations

from typing import Any

BLOCK_BITS = 12
"""Numbers whose bits stand together: 2 to this power."""
BYTES = (1 << BLOCK_BITS) // 8


class Distinct:
    """Counts distinct integers from 0 to 2^62 in a bit for each if their neighbors occur too, else in at most 800
    bytes."""

    def __init__(self) -> None:
        import numpy as np

        self._blocks = np.empty(0, np.int64)
        """The first number of each block that is present, shifted by BLOCK_BITS, in order."""
        self._rows = np.empty(0, np.int64)
        """The row of `_bits` of each block."""
        self._bits = np.zeros((0, BYTES), np.uint8)

    def add(self, numbers: Any) -> None:
        """numbers: array of int64."""
        import numpy as np

        numbers = np.unique(numbers)
        blocks = numbers >> BLOCK_BITS
        self._insert(np.setdiff1d(blocks, self._blocks))
        bit = (numbers & ((1 << BLOCK_BITS) - 1)).astype(np.int64)
        byte = self._rows[np.searchsorted(self._blocks, blocks)] * BYTES + (bit >> 3)
        np.bitwise_or.at(self._bits.reshape(-1), byte, (1 << (bit & 7)).astype(np.uint8))

    def count(self) -> int:
        import numpy as np

        slices = (self._bits[start : start + 4096] for start in range(0, len(self._bits), 4096))
        return sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in slices)

    def _insert(self, blocks: Any) -> None:
        """Adds new blocks."""
        import numpy as np

        size = len(self._blocks)
        if size + len(blocks) > len(self._bits):
            bits = np.zeros((max(size + len(blocks), len(self._bits) * 3 // 2), BYTES), np.uint8)
            bits[:size] = self._bits[:size]
            self._bits = bits
        places = np.searchsorted(self._blocks, blocks)
        self._rows = np.insert(self._rows, places, np.arange(size, size + len(blocks)))
        self._blocks = np.insert(self._blocks, places, blocks)
