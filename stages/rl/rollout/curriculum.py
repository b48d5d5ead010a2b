"""The curriculum: draws tasks from bins of one kind and level, weighted by size and by the signal expected.

A group of answers has the most signal if half of them pass (the variance of a coin, p(1 - p)) and none if all or none
do. Every bin is drawn from the start, and never quite left: a level that is too hard today gets its turn when others
have taught enough of it, and a level that teaches nothing stops no other. The state is plain JSON and part of every
checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypedDict

from pipeline.core.errors import AtomError, RecipeError
from stages.formats.seeds import seed_of
from stages.tasks import Row, bin_of

# The least signal that a bin is taken to have; the most is 1.
FLOOR = 0.05
# The weight of the newest group in the moving average of the pass rate of its bin.
NEWEST = 0.1


class BinState(TypedDict):
    """The state of a bin: the tasks drawn so far, and the moving pass rate (None before the first group)."""

    drawn: int
    rate: float | None


class Curriculum:
    """Draws tasks and tracks their pass rates."""

    def __init__(
        self, tasks: Sequence[Row], label: str, seed: int, uniform: bool = False, size_exponent: float = 1.0
    ) -> None:
        """Sorts tasks into bins.

        Args:
            tasks: All tasks.
            label: Label of the phase in seeds.
            seed: Seed of the recipe.
            uniform: Draws from every bin equally, for any pass rates.
            size_exponent: Exponent of a bin's number of tasks in its weight.

        Raises:
            RecipeError: There is no task.
        """
        if not tasks:
            raise RecipeError("there is no task to draw from; give the phase a source of tasks")
        self.label, self.seed, self.uniform, self.size_exponent = label, seed, uniform, size_exponent
        self.bins: dict[str, list[Row]] = {}
        for row in tasks:
            self.bins.setdefault(bin_of(row), []).append(row)
        self.state: dict[str, BinState] = {name: {"drawn": 0, "rate": None} for name in sorted(self.bins)}
        self._orders: dict[str, tuple[int, list[int]]] = {}  # {bin: the latest epoch, and its order}

    def copy(self) -> dict[str, BinState]:
        """Returns a copy of the state: a checkpoint is written while the next step already changes the state."""
        return {name: bin_state.copy() for name, bin_state in self.state.items()}

    def load(self, state: Mapping[str, BinState]) -> None:
        """Restores a state. Raises AtomError for the state of other bins."""
        if state.keys() != self.state.keys():
            raise AtomError(
                f"the state of the curriculum is of the bins {', '.join(sorted(state))}, and the tasks are of "
                f"{', '.join(sorted(self.state))}; one of the two was changed"
            )
        self.state = {name: bin_state.copy() for name, bin_state in state.items()}

    def weights(self) -> dict[str, float]:
        """Returns the weight of each bin: its number of tasks to the power of size_exponent, times 4 p (1 - p).

        The latter factor is 1 for an unknown p, and at least the floor.
        """
        if self.uniform:
            return dict.fromkeys(self.state, 1.0)
        rates = {name: bin_state["rate"] for name, bin_state in self.state.items()}
        signals = {name: 1.0 if p is None else max(FLOOR, 4 * p * (1 - p)) for name, p in rates.items()}
        # A power of 1 is exact, so that recipes without the setting draw as before it.
        return {name: len(self.bins[name]) ** self.size_exponent * signal for name, signal in signals.items()}

    def draw(self, count: int, step: int, wave: int) -> list[Row]:
        """Returns `count` tasks for a wave of a step. Each bin is read in a seeded order, and repeated from its end."""
        weights = self.weights()
        rng = random.Random(seed_of(f"{self.label}/draw/{step}/{wave}", self.seed))
        # From a generator of its own for each wave, so that a resumed phase draws the same tasks.
        names = rng.choices(list(weights), list(weights.values()), k=count)
        drawn = []
        for name in names:
            rows, draws = self.bins[name], self.state[name]["drawn"]
            epoch, position = divmod(draws, len(rows))
            drawn.append(rows[self._order(name, epoch)[position]])
            self.state[name]["drawn"] = draws + 1
        return drawn

    def _order(self, name: str, epoch: int) -> list[int]:
        if self._orders.get(name, (None, []))[0] != epoch:
            order = list(range(len(self.bins[name])))
            random.Random(seed_of(f"{self.label}/{name}/epoch {epoch}", self.seed)).shuffle(order)
            self._orders[name] = epoch, order
        return self._orders[name][1]

    def update(self, row: Row, pass_rate: float) -> None:
        """Updates the pass rate of a task's bin with that of one group."""
        bin_state = self.state[bin_of(row)]
        previous = bin_state["rate"]
        bin_state["rate"] = pass_rate if previous is None else previous + NEWEST * (pass_rate - previous)
