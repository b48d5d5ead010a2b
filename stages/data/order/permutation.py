"""Seeded permutations as functions: the image of any index, and its inverse, without a table.

A balanced Feistel network over pairs of digits permutes a square of side ceil(sqrt(n)), and cycle-walking leaves out
what lies beyond n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Time and memory are the
same for every n, so that a step of a phase of any length can be looked up in both directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Digits = tuple[NDArray[np.uint64], NDArray[np.uint64]]

MOST = 1 << 40
"""The largest supported n."""
ROUNDS = 6
"""Four rounds make a Feistel network pseudo-random (Luby and Rackoff, 1988); small squares need a few more."""
SLICE = 1 << 15
"""Indices that are computed together: their intermediate values stay in the processor's cache."""


class Permutation:
    """A permutation of 0..n-1, fixed by a label and a seed."""

    def __init__(self, n: int, label: str, seed: int) -> None:
        """Raises ValueError unless 1 <= n <= 2^40."""
        if not 1 <= n <= MOST:
            raise ValueError(f"a permutation of {n} indices; from 1 to 2^40 are supported")
        self.n, self.side = n, math.isqrt(n - 1) + 1
        keys = hashlib.sha512(f"{label}\0{seed}".encode()).digest()
        self.keys = [int.from_bytes(keys[8 * i : 8 * i + 8], "big") for i in range(ROUNDS)]

    def __call__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The images of indices, of the same shape."""
        return self._walk(indices, self._forward)

    def inverse(self, images: ArrayLike) -> NDArray[np.int64]:
        """The indices with these images, of the same shape."""
        return self._walk(images, self._backward)

    def _walk(self, values: ArrayLike, step: Callable[[Digits], Digits]) -> NDArray[np.int64]:
        import numpy as np

        given = np.asarray(values, np.int64)
        flat = given.ravel()
        if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= self.n):
            raise ValueError(f"an index is outside of 0..{self.n - 1}")
        result = np.empty_like(flat)
        for start in range(0, len(flat), SLICE):
            part = self._apply(flat[start : start + SLICE].view(np.uint64), step)
            while len(beyond := np.flatnonzero(part >= np.uint64(self.n))):
                part[beyond] = self._apply(part[beyond], step)
            result[start : start + SLICE] = part.view(np.int64)
        return result.reshape(given.shape)

    def _apply(self, values: NDArray[np.uint64], step: Callable[[Digits], Digits]) -> NDArray[np.uint64]:
        """One pass of the network over the square, of which 0..n-1 is a part."""
        import numpy as np

        side = np.uint64(self.side)
        high = values // side
        high, low = step((high, values - high * side))
        high *= side
        high += low
        return high

    def _forward(self, digits: Digits) -> Digits:
        """A round is (left, right) -> (right, left + f(right))."""
        import numpy as np

        (left, right), side = digits, np.uint64(self.side)
        for key in self.keys:
            left += self._round(right, key)
            left -= side * (left >= side)
            left, right = right, left
        return left, right

    def _backward(self, digits: Digits) -> Digits:
        import numpy as np

        (left, right), side = digits, np.uint64(self.side)
        for key in reversed(self.keys):
            left, right = right, left
            left += side - self._round(right, key)
            left -= side * (left >= side)
        return left, right

    def _round(self, digit: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
        """A keyed hash of a digit, below `side`: SplitMix64's finalizer (Steele et al., 2014), and a multiplication in
        place of a remainder (Lemire, 2019)."""
        import numpy as np

        z = digit * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(key)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        z >>= np.uint64(32)
        z *= np.uint64(self.side)
        z >>= np.uint64(32)
        return z
