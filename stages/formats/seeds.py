"""Seeds and permutations from a label and a number, independent of clocks, hash order and library versions.

The label of a phase never changes when the phase is renamed, because other seeds make other models.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def seed_of(label: str, seed: int) -> int:
    """Returns a 64-bit seed for one purpose: different labels give independent streams of the same recipe seed."""
    return int.from_bytes(hashlib.sha256(f"{label}\0{seed}".encode()).digest()[:8], "big")


def split_mix(numbers: NDArray[np.uint64], label: str, seed: int) -> NDArray[np.uint64]:
    """Returns the hash of each number by SplitMix64 (Steele et al. 2014), in the same shape."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = np.uint64(seed_of(label, seed)) + numbers * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(n: int, label: str, seed: int) -> NDArray[np.int64]:
    """Returns a permutation of 0..n-1, shape [n].

    Indices are sorted by their hash, so that the result is fixed by arithmetic; the streams of numpy's generators may
    change between its releases.
    """
    import numpy as np

    hashes = split_mix(np.arange(1, n + 1, dtype=np.uint64), label, seed)
    return np.argsort(hashes, kind="stable").astype(np.int64)


LABELS = {"dpo": "rlhf", "online-rlhf": "online"}
"""{phase: its label, if this is an earlier name of the phase}"""


def seed_label(phase: str) -> str:
    """The label of a phase in its seeds."""
    return LABELS.get(phase, phase)
