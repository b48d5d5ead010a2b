"""Task source `long-lists`: a question about more numbers than a prompt shows, for recursive calls."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Range
from stages.data.seeds import seed_of
from stages.rl.protocols import Row, TaskSource
from stages.rl.rollout.task_sources.settings import PROVENANCE, Count, SourceSettings
from stages.rl.tools.recursive_call import make_row

Operation = Literal["largest", "smallest"]
Doublings = Annotated[int, Range(0, 5)]
SMALLEST, LARGEST = 100, 999
"""The numbers, all of which have three digits."""


class LongListTasks(SourceSettings):
    """Distinct numbers of three digits, one a part, of which the largest or smallest is asked for."""

    verifier: ClassVar[str] = "exact"
    source: Literal["long-lists"] = Field(description="selects this kind of tasks")
    operation: Operation = Field(description="what is asked for, which is the kind of the tasks")
    shown_parts: Annotated[int, Range(2, 16)] = Field(description="numbers that a prompt shows at most")
    levels: tuple[Doublings, ...] = Field(
        min_length=1, max_length=6, description="numbers of doublings of shown_parts, one bin each; 0: all are shown"
    )
    count: Count = Field(description="number of tasks per level")

    def bins(self) -> list[str]:
        return [f"{self.operation}/{level}" for level in self.levels]

    def chance(self, level: int) -> float:
        """One of the numbers is right."""
        return 1 / (self.shown_parts << level)

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/{self.operation}/{self.shown_parts}/{level}", seed))
            for i in range(self.count):
                numbers = draw_numbers(rng, self.operation, self.shown_parts << level)
                id = f"{self.operation}/{level}/{i:06d}"
                yield row_of(id, self.operation, numbers, self.shown_parts, level)


def draw_numbers(rng: random.Random, operation: Operation, count: int) -> list[int]:
    """Distinct numbers in any order. The answer has any value that leaves room for the others equally often, so that a
    part of the numbers does not give it away."""
    if operation == "largest":
        answer = rng.randint(SMALLEST + count - 1, LARGEST)
        others = range(SMALLEST, answer)
    else:
        answer = rng.randint(SMALLEST, LARGEST - count + 1)
        others = range(answer + 1, LARGEST + 1)
    numbers = [answer, *rng.sample(others, count - 1)]
    rng.shuffle(numbers)
    return numbers


def row_of(id: str, operation: Operation, numbers: Sequence[int], shown_parts: int, level: int) -> dict[str, Any]:
    best = max(numbers) if operation == "largest" else min(numbers)
    return make_row(
        id, operation, [str(n) for n in numbers], shown_parts, "exact", operation, level,
        expected_answer=str(best),
    ) | PROVENANCE  # fmt: skip


SOURCE: type[TaskSource] = LongListTasks
