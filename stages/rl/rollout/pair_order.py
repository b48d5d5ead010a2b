"""Which pairs each step of a reward model reads: a function of the questions, the settings and the seed."""

from __future__ import annotations

import hashlib
import random

from stages.formats.seeds import seed_of


def hash_fraction(question: str) -> float:
    """A hash of a text, as a number in [0, 1). Pairs whose question has less than `heldout_fraction` are held out."""
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 2**32


class PairOrder:
    """The order of the pairs that a reward model learns from: all of them once an epoch, shuffled anew in each.

    count: of the pairs that are not held out; per_step: pairs of a step; label: of the phase in seeds; seed: the
    recipe's.
    """

    def __init__(self, count: int, per_step: int, label: str, seed: int) -> None:
        self.count, self.per_step, self.label, self.seed = count, per_step, label, seed
        self._epoch, self._shuffled = -1, list[int]()

    def of_step(self, step: int) -> list[int]:
        """The numbers of the pairs of a step (from 1), from 0 to count - 1."""
        numbers = []
        for number in range((step - 1) * self.per_step, step * self.per_step):
            epoch, position = divmod(number, self.count)
            numbers.append(self._of_epoch(epoch)[position])
        return numbers

    def _of_epoch(self, epoch: int) -> list[int]:
        """The last epoch is kept, since a step needs it for each pair."""
        if self._epoch != epoch:
            self._shuffled = list(range(self.count))
            random.Random(seed_of(f"{self.label}/epoch {epoch}", self.seed)).shuffle(self._shuffled)
            self._epoch = epoch
        return self._shuffled
