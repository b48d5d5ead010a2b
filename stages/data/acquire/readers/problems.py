"""Reader `problems`: procedural problems as plain text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.core.bounds import Key, Range
from stages.data.acquire.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.formats.seeds import seed_of
from stages.tasks.synthetic.problems import FORMS, TASKS, draw


def _require_known_tasks(tasks: dict[str, float]) -> dict[str, float]:
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]}; known are {', '.join(sorted(TASKS))}")
    return tasks


TaskWeights = Annotated[
    dict[Key, Annotated[float, Range(0, 1000, above=True)]],
    Field(min_length=1, max_length=100),
    AfterValidator(_require_known_tasks),
]
"""Weights of tasks by name; they need not sum to 1."""


class Problems(Reader):
    """Procedural problems, drawn with the seed of the recipe."""

    reader: Literal["problems"] = Field(description="selects this reader")
    tasks: TaskWeights = Field(description="weights of tasks by name; they need not sum to 1")
    form: Literal["plain", "worked"] = Field(
        description="plain: question and answer; worked: with the steps between them"
    )
    count: Drawn = Field(description="number of problems")

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        rng = random.Random(seed_of(f"problems/{source}", seed))
        for i, problem in enumerate(draw(self.tasks, self.count, rng)):
            text, prompt_chars = FORMS[self.form](problem)
            yield Document(f"{problem.task}/{i:07d}", text, problem.task, prompt_chars)


READER = Problems
