"""Evaluation problems of the recipe: drawn before any training data, and what decontamination searches for."""

from __future__ import annotations

import random
from pathlib import Path

from pydantic import Field, field_validator

from pipeline.errors import RecipeError
from pipeline.stage import Config, Inputs, Report, Stage
from stages.data.problems import TASKS, distinct
from stages.data.seeds import seed_of
from stages.data.table import ITEMS, write_rows

VERSION = 1


class ItemsConfig(Config):
    """How many problems of each task, and the recipe's seed."""

    problems: dict[str, int] = Field(min_length=1)
    seed: int

    @field_validator("problems")
    @classmethod
    def _known(cls, problems: dict[str, int]) -> dict[str, int]:
        unknown = sorted(set(problems) - set(TASKS))
        if unknown:
            raise ValueError(f"unknown task {unknown[0]}; known are {', '.join(sorted(TASKS))}")
        if min(problems.values()) < 1:
            raise ValueError("each task needs at least one problem")
        return problems


def run(config: ItemsConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal `items.parquet`: id, task, prompt, answer, and the text that must not occur in training data.

    The seed's label differs from that of the training problems, so the two streams are independent; a training
    problem may equal an item by chance, and is then removed and counted by curation.
    """
    rows = []
    for task in sorted(config.problems):
        rng = random.Random(seed_of(f"items/{task}", config.seed))
        try:
            found = distinct(task, config.problems[task], rng)
        except ValueError as error:
            raise RecipeError(f"evaluation.problems: {error}; ask for fewer") from None
        for i, p in enumerate(found):
            row = {"task": task, "prompt": p.prompt, "answer": p.answer, "text": p.question}
            rows.append({"id": f"{task}/{i:05d}", **row})
    write_rows(out / "items.parquet", ITEMS, rows)
    report.note(f"{len(rows)} evaluation items")


STAGE = Stage("items", VERSION, ItemsConfig, run, promise="bitwise")
