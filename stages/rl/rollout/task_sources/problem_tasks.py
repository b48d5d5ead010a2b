"""Task source `problems`: procedural problems, scored by the verifier `exact`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.core.errors import RecipeError
from stages.data.seeds import seed_of
from stages.data.synthetic import problems
from stages.data.synthetic.problems import Problem
from stages.evaluation.eval_set import Task
from stages.rl.protocols import Row, TaskSource, to_row
from stages.rl.rollout.task_sources.settings import PROVENANCE, Count, Level, SourceSettings


class ProblemSource(SourceSettings):
    """Procedural problems of this project (stages/data/synthetic/problems.py)."""

    verifier: ClassVar[str]
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
                fields = self._fields(problem) | PROVENANCE
                id = f"{self.task}/{level}/{i:06d}"
                yield to_row(id, problem.question, self.verifier, self.task, level, **fields)

    def _fields(self, problem: Problem) -> dict[str, Any]:
        """The fields of a row for its verifier."""
        return {"question": problem.question, "expected_answer": problem.answer}


class ProblemTasks(ProblemSource):
    """Procedural problems, of which the answer alone is verified."""

    verifier: ClassVar[str] = "exact"
    source: Literal["problems"] = Field(description="selects this kind of tasks")


SOURCE: type[TaskSource] = ProblemTasks
