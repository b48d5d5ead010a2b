"""The task sources that programs generate: `problems`, `courtesies`, `instructions`, and datasets of reasoning-gym."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, Range, Settings
from pipeline.core.errors import AtomError, RecipeError
from stages.formats.seeds import seed_of
from stages.rl.protocols import PROVENANCE, Count, Level, Response, TaskSource, make_verifier
from stages.tasks import Row, to_row
from stages.tasks.eval_set import Task, asking_for_fewer, courtesy_row
from stages.tasks.synthetic import courtesy_notes, problems
from stages.tasks.synthetic.courtesy_notes import LEVELS


class ProblemTasks(TaskSource):
    """Procedural problems, of which the answer alone is verified."""

    verifier: ClassVar[str] = "exact"
    source: Literal["problems"]
    """selects this kind of tasks"""
    task: Task
    """name of the task, such as add"""
    levels: tuple[Level, ...] = Field(min_length=1, max_length=100)
    """levels of difficulty, one bin each"""
    count: Count
    """maximum number of tasks per level; easy levels may have fewer"""

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


class CourtesyTasks(TaskSource):
    """Requests for a courteous note, scored by a reward function."""

    source: Literal["courtesies"]
    """selects this kind of tasks"""
    verifier: Key = "courtesy"
    """reward function: courtesy (rules) or reward-model (trained)"""
    count: Count
    """number of requests"""

    def bins(self) -> list[str]:
        return ["courtesy/1"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        rng = random.Random(seed_of("tasks/courtesies", seed))
        with asking_for_fewer("tasks"):
            requests = courtesy_notes.draw_distinct(self.count, rng, heldout=False)
        for i, request in enumerate(requests):
            yield courtesy_row(f"courtesy/{i:06d}", request, self.verifier, **PROVENANCE)


class InstructionTasks(TaskSource):
    """Requests for a note of a form (stages/tasks/synthetic/courtesy_notes.py).

    The level is the number of constraints.
    """

    verifier: ClassVar[str] = "instructions"
    source: Literal["instructions"]
    """selects this kind of tasks"""
    levels: tuple[Annotated[int, Range(LEVELS[0], LEVELS[-1])], ...] = Field(min_length=1, max_length=len(LEVELS))
    """numbers of constraints, one bin each"""
    count: Count
    """number of tasks per level"""

    def bins(self) -> list[str]:
        return [f"instructions/{level}" for level in self.levels]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/instructions/{level}", seed))
            with asking_for_fewer("tasks"):
                requests = courtesy_notes.requests(self.count, rng, level)
            for i, (text, fields) in enumerate(requests):
                id = f"instructions/{level}/{i:06d}"
                yield to_row(id, text, self.verifier, "instructions", level, **fields, **PROVENANCE)


class ReasoningGymTasks(TaskSource):
    """A dataset of the package reasoning-gym."""

    verifier: ClassVar[str] = "reasoning-gym"
    source: Literal["reasoning-gym"]
    """selects this kind of tasks"""
    dataset: Key
    """name of the dataset"""
    level: Level = 1
    """level of the bin; `settings` determine the difficulty"""
    settings: Settings = Field(default_factory=dict)
    """arguments of the dataset, by name"""
    count: Count
    """number of tasks"""

    def bins(self) -> list[str]:
        return [f"{self.dataset}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        dataset_seed = seed_of(f"tasks/{self.dataset}/{self.level}", seed) % 2**31
        yield from reasoning_gym_rows(self.dataset, dataset_seed, self.count, self.level, self.settings)


def reasoning_gym_rows(
    dataset: str, seed: int, count: int, level: int = 0, settings: Mapping[str, Any] | None = None
) -> list[Row]:
    """Returns `count` rows of a dataset with these settings of its own. Their kind is the dataset's name.

    Raises:
        AtomError: There is no such dataset, it refuses the settings, or its answers cannot be scored here.
    """
    from stages.rl.rewards.pooled_verifier import ReasoningGym

    arguments = dict(settings or {})
    verifier = make_verifier(ReasoningGymTasks.verifier)
    try:
        from reasoning_gym.factory import create_dataset

        try:
            entries = create_dataset(dataset, seed=seed, size=count, **arguments)
        except (ValueError, TypeError, AssertionError) as error:
            text = f"reasoning_gym dataset {dataset} with {arguments}: {error}; see its configuration"
            raise AtomError(text) from error
        rows: list[Row] = []
        for i, entry in enumerate(entries):
            row = to_row(
                f"{dataset}-{seed}-{i}", entry["question"], ReasoningGymTasks.verifier, dataset, level, **entry
            )
            # In the form after reading: JSON turns tuples into lists, which some datasets cannot score.
            rows.append(json.loads(json.dumps(row)))
        # The verifier probes every row, and so refuses a dataset whose own answers get less than full marks.
        verifier.score([(row, Response.parse(ReasoningGym.correct_answer(row), finished=True)) for row in rows])
    finally:
        verifier.close()
    return rows
