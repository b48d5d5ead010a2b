"""The sources of tasks by name. A new one is a file in this folder and a line here.

The file defines a Config with the interface `TaskSource` (stages/rl/protocols.py). Its field `source` has the name as
its only value. All are imported with this module, since the recipe's schema needs them.
"""

from __future__ import annotations

from pkgutil import resolve_name

from stages.rl.protocols import TaskSource

TASK_SOURCES = {
    "problems": "stages.rl.rollout.task_sources.procedural_tasks:ProblemTasks",
    "courtesies": "stages.rl.rollout.task_sources.procedural_tasks:CourtesyTasks",
    "instructions": "stages.rl.rollout.task_sources.procedural_tasks:InstructionTasks",
    "reasoning-gym": "stages.rl.rollout.task_sources.reasoning_tasks:ReasoningGymTasks",
    "hub": "stages.rl.rollout.task_sources.hub_tasks:HubTasks",
    "rows": "stages.rl.rollout.task_sources.file_tasks:FileTasks",
}
"""{source: its class}."""


def source_classes() -> tuple[type[TaskSource], ...]:
    """Returns the classes of all sources, in the order of the registry."""
    return tuple(map(resolve_name, TASK_SOURCES.values()))
