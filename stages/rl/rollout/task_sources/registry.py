"""The sources of tasks by name, and settings that they share. A new one is a file in this folder and a line here.

The file defines a Config with the interface `TaskSource` (stages/rl/protocols.py). Its field `source` has the name as
its only value. stages/rl/rollout/tasks.py imports all of them, for the recipe's schema.
"""

from __future__ import annotations

from typing import Annotated

from pipeline.core.bounds import Range, Share, Words
from pipeline.core.extensions import extend, imported
from pipeline.core.stage import Config, operational
from stages.rl.protocols import TaskSource

# A level of difficulty.
Level = Annotated[int, Range(0, 1000)]
# A number of tasks.
Count = Annotated[int, Range(1, 1e7)]
# A kind of tasks.
Kind = Annotated[str, Words(64, "name of lower-case letters, digits, '_' and '-'", r"[a-z][a-z0-9_-]*")]
# Fields of a row that this project generates.
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}
TASK_SOURCES = {
    "problems": "stages.rl.rollout.task_sources.procedural_tasks:ProblemTasks",
    "courtesies": "stages.rl.rollout.task_sources.procedural_tasks:CourtesyTasks",
    "instructions": "stages.rl.rollout.task_sources.procedural_tasks:InstructionTasks",
    "reasoning-gym": "stages.rl.rollout.task_sources.procedural_tasks:ReasoningGymTasks",
    "hub": "stages.rl.rollout.task_sources.stored_tasks:HubTasks",
    "rows": "stages.rl.rollout.task_sources.stored_tasks:FileTasks",
}
extend("task_sources", TASK_SOURCES)


class SourceSettings(Config):
    """Settings of every source of tasks."""

    acknowledged_reward: Share | None = operational(None)
    """mean reward up to which tasks are used although an answer that solves nothing earns it, which the cards
    state; null: 0.05 above chance"""


def source_classes() -> tuple[type[TaskSource], ...]:
    """Returns the classes of all sources, in the order of the registry."""
    return tuple(map(imported, TASK_SOURCES.values()))
