"""Task source `instructions`: requests for a note of a given form, scored by the verifier `instructions`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.errors import RecipeError
from stages.data.seeds import seed_of
from stages.data.synthetic import instructions
from stages.data.synthetic.instructions import LEVELS
from stages.rl.protocols import Row, TaskSource, to_row
from stages.rl.rollout.task_sources.settings import PROVENANCE, Count, SourceSettings


class InstructionTasks(SourceSettings):
    """Requests for a note of a given form (stages/data/synthetic/instructions.py). The level is the number of
    constraints."""

    verifier: ClassVar[str] = "instructions"
    source: Literal["instructions"] = Field(description="selects this kind of tasks")
    levels: tuple[Annotated[int, Range(LEVELS[0], LEVELS[-1])], ...] = Field(
        min_length=1, max_length=len(LEVELS), description="numbers of constraints, one bin each"
    )
    count: Count = Field(description="number of tasks per level")

    def bins(self) -> list[str]:
        return [f"instructions/{level}" for level in self.levels]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/instructions/{level}", seed))
            try:
                requests = instructions.requests(self.count, rng, level)
            except ValueError as error:
                raise RecipeError(f"tasks: {error}; ask for fewer") from None
            for i, (text, fields) in enumerate(requests):
                id = f"instructions/{level}/{i:06d}"
                yield to_row(id, text, self.verifier, "instructions", level, **fields, **PROVENANCE)


SOURCE: type[TaskSource] = InstructionTasks
