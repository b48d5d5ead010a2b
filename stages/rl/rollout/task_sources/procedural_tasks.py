"""The task sources that this project generates: `problems`, `courtesies` and `instructions`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, Range
from pipeline.core.errors import RecipeError
from stages.formats.seeds import seed_of
from stages.rl.rollout.task_sources.settings import PROVENANCE, Count, Level, SourceSettings
from stages.tasks.eval_set import Task, courtesy_row
from stages.tasks.rows import Row, to_row
from stages.tasks.synthetic import courtesy_notes, problems
from stages.tasks.synthetic.courtesy_notes import LEVELS


class ProblemTasks(SourceSettings):
    """Procedural problems, of which the answer alone is verified."""

    verifier: ClassVar[str] = "exact"
    source: Literal["problems"] = Field(description="selects this kind of tasks")
    task: Task = Field(description="name of the task, such as add")
    levels: tuple[Level, ...] = Field(min_length=1, max_length=100, description="levels of difficulty, one bin each")
    count: Count = Field(description="maximum number of tasks per level; easy levels may have fewer")

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for level in self.levels:
            problems.TASKS[self.task](random.Random(0), level)  # raises ValueError in words if there is none
        return self

    def bins(self) -> list[str]:
        return [f"{self.task}/{level}" for level in self.levels]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/{self.task}/{level}", seed))
            generated = problems.draw_up_to(self.task, self.count, rng, level, excluded)
            if not generated:
                raise RecipeError(f"task {self.task} has no problem of level {level} that is not an evaluation item")
            for i, problem in enumerate(generated):
                fields = {"question": problem.question, "expected_answer": problem.answer, **PROVENANCE}
                id = f"{self.task}/{level}/{i:06d}"
                yield to_row(id, problem.question, self.verifier, self.task, level, **fields)


class CourtesyTasks(SourceSettings):
    """Requests for a courteous note, scored by a reward function."""

    source: Literal["courtesies"] = Field(description="selects this kind of tasks")
    verifier: Key = Field("courtesy", description="reward function: courtesy (rules) or reward-model (trained)")
    count: Count = Field(description="number of requests")

    def bins(self) -> list[str]:
        return ["courtesy/1"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        try:
            requests = courtesy_notes.draw_distinct(
                self.count, random.Random(seed_of("tasks/courtesies", seed)), heldout=False
            )
        except ValueError as error:
            raise RecipeError(f"tasks: {error}; ask for fewer") from None
        for i, request in enumerate(requests):
            yield courtesy_row(f"courtesy/{i:06d}", request, self.verifier, **PROVENANCE)


class InstructionTasks(SourceSettings):
    """Requests for a note of a form (stages/tasks/synthetic/courtesy_notes.py). The level is the number of
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
                requests = courtesy_notes.requests(self.count, rng, level)
            except ValueError as error:
                raise RecipeError(f"tasks: {error}; ask for fewer") from None
            for i, (text, fields) in enumerate(requests):
                id = f"instructions/{level}/{i:06d}"
                yield to_row(id, text, self.verifier, "instructions", level, **fields, **PROVENANCE)
