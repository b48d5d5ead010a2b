"""Task source `reasoning-gym`: a dataset of the package reasoning-gym, scored by the verifier `reasoning-gym`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Key, Settings
from pipeline.core.errors import AtomError
from stages.formats.seeds import seed_of
from stages.rl.protocols import Response
from stages.rl.rewards.registry import make_verifier
from stages.rl.rollout.task_sources.settings import Count, Level, SourceSettings
from stages.tasks.rows import Row, to_row


class ReasoningGymTasks(SourceSettings):
    """A dataset of the package reasoning-gym."""

    verifier: ClassVar[str] = "reasoning-gym"
    source: Literal["reasoning-gym"] = Field(description="selects this kind of tasks")
    dataset: Key = Field(description="name of the dataset")
    level: Level = Field(1, description="level of the bin; `settings` determine the difficulty")
    settings: Settings = Field(default_factory=dict, description="arguments of the dataset, by name")
    count: Count = Field(description="number of tasks")

    def bins(self) -> list[str]:
        return [f"{self.dataset}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        dataset_seed = seed_of(f"tasks/{self.dataset}/{self.level}", seed) % 2**31
        yield from reasoning_gym_rows(self.dataset, dataset_seed, self.count, self.level, self.settings)


def reasoning_gym_rows(
    dataset: str, seed: int, count: int, level: int = 0, settings: Mapping[str, Any] | None = None
) -> list[Row]:
    """`count` rows of a dataset with these settings of its own. Kind: the dataset's name.

    Raises AtomError if there is no such dataset, it refuses the settings, or its answers cannot be scored here.
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
        verifier.score([(row, Response.parse(ReasoningGym.correct_answer(row), finished=True)) for row in rows])
    finally:
        verifier.close()
    return rows
