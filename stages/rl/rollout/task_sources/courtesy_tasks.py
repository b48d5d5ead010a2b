"""Task source `courtesies`: requests for a courteous note, scored by rules or by a trained reward model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Key
from pipeline.core.errors import RecipeError
from stages.data.seeds import seed_of
from stages.data.synthetic import courtesy_notes
from stages.evaluation.eval_set import courtesy_row
from stages.rl.protocols import Row, TaskSource
from stages.rl.rollout.task_sources.settings import PROVENANCE, Count, SourceSettings


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


SOURCE: type[TaskSource] = CourtesyTasks
