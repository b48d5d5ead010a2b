"""The filter of a phase's tasks by their pass rates under the policy that the phase starts from.

A task that this policy always or never solves gives no gradient: all answers of its group have the same reward. The
stage `pass-rates` (stages/evaluation/pass_rates.py) measures the rates before the phase; this module reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from pydantic import model_validator

from pipeline.core.bounds import Range, Share
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config
from pipeline.core.store import Artifact
from stages.rl.protocols import TaskSource
from stages.tasks import bin_of

PASS_RATES = "pass_rates.json"
"""The file of the rates, {id of a task: mean reward of its answers}."""
# Tasks of a bin whose source does not state their number, for `atom plan` alone.
ASSUMED_TASKS = 1000


class PassRateFilter(Config):
    """Tasks are left out that the policy at the start of the phase solves always or never."""

    num_samples: Annotated[int, Range(2, 4096, "usual: 4 to 16")] = 8
    """answers to each task; the rate is the mean of their rewards"""
    above: Share | None = 0.0
    """tasks with this rate or a lower one are left out; null: none is for a low rate"""
    below: Share | None = 1.0
    """tasks with this rate or a higher one are left out; null: none is for a high rate"""

    @model_validator(mode="after")
    def _leaves_some(self) -> PassRateFilter:
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(
                f"above = {self.above:g} and below = {self.below:g} leave no rate between; set above lower"
            )
        return self

    def keeps(self, rate: float) -> bool:
        """Returns True if a task with this rate is used."""
        return (self.above is None or rate > self.above) and (self.below is None or rate < self.below)


class FilteredBin(TypedDict):
    """The tasks of a bin before and after the filter."""

    tasks: int
    """number of tasks"""
    never: int
    """those with the rate 0"""
    always: int
    """those with the rate 1"""
    kept: int
    """those that the phase uses"""


def filter_tasks(
    rows: Sequence[dict[str, Any]], artifact: Artifact, settings: PassRateFilter
) -> tuple[list[dict[str, Any]], dict[str, FilteredBin]]:
    """Returns the tasks that a phase uses, and the numbers of each bin.

    Raises:
        AtomError: The rates are of other tasks.
        RecipeError: No task is left.
    """
    rates: Mapping[str, float] = artifact.json(PASS_RATES)
    if rates.keys() != {row["id"] for row in rows}:
        raise AtomError(f"{artifact.path / PASS_RATES} has the rates of other tasks; remove it and run again")
    bins: dict[str, FilteredBin] = {}
    kept = [row for row in rows if settings.keeps(rates[row["id"]])]
    for row in rows:
        counts = bins.setdefault(bin_of(row), {"tasks": 0, "never": 0, "always": 0, "kept": 0})
        rate = rates[row["id"]]
        counts["tasks"] += 1
        counts["never"] += rate == 0
        counts["always"] += rate == 1
        counts["kept"] += settings.keeps(rate)
    if not kept:
        raise RecipeError(
            f"rlvr.pass_rates leaves none of {len(rows)} tasks: the policy at the start solves each of them always or "
            "never; give tasks of another difficulty, or fine-tune longer"
        )
    return kept, dict(sorted(bins.items()))


def expected_tasks(sources: Sequence[TaskSource]) -> int:
    """Returns the most tasks of the sources, as far as they state it: some give `count` for each of their bins."""
    numbers: list[Any] = [getattr(source, "count", ASSUMED_TASKS) for source in sources]
    return sum(number * len(source.bins()) for number, source in zip(numbers, sources, strict=True))
