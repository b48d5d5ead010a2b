"""Settings that sources of tasks share."""

from __future__ import annotations

from typing import Annotated

from pipeline.core.bounds import Range, Share, Words
from pipeline.core.stage import Config, operational

Level = Annotated[int, Range(0, 1000)]
"""A level of difficulty."""
Count = Annotated[int, Range(1, 1e7)]
"""A number of tasks."""
Kind = Annotated[str, Words(64, "name of lower-case letters, digits, '_' and '-'", r"[a-z][a-z0-9_-]*")]
"""A kind of tasks."""
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}
"""Fields of a row that this project generates."""


class SourceSettings(Config):
    """Settings of every source of tasks."""

    acknowledged_reward: Share | None = operational(
        None,
        "mean reward up to which tasks are used although an answer that solves nothing earns it, which the cards "
        "state; null: 0.05 above chance",
    )

    def chance(self, level: int) -> float:
        """The share of right answers among guesses between what a question shows; 0: it shows no choice."""
        return 0.0
