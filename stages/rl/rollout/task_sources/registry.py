"""The sources of tasks by name. A new one is a file in this folder and a line here.

The file defines a Config with the interface `TaskSource` (stages/rl/protocols.py) and names it `SOURCE`. Its field
`source` has the name as its only value. All are imported with this module, since the recipe's schema needs them.
"""

from __future__ import annotations

from importlib import import_module

from stages.rl.protocols import TaskSource

TASK_SOURCES = {
    "problems": "stages.rl.rollout.task_sources.problem_tasks",
    "worked-problems": "stages.rl.rollout.task_sources.worked_tasks",
    "courtesies": "stages.rl.rollout.task_sources.courtesy_tasks",
    "instructions": "stages.rl.rollout.task_sources.instruction_tasks",
    "long-lists": "stages.rl.rollout.task_sources.long_list_tasks",
    "reasoning-gym": "stages.rl.rollout.task_sources.reasoning_tasks",
    "hub": "stages.rl.rollout.task_sources.hub_tasks",
    "rows": "stages.rl.rollout.task_sources.file_tasks",
}
"""{source: its module}."""


def source_classes() -> tuple[type[TaskSource], ...]:
    """The classes of all sources, in the order of the registry."""
    return tuple(import_module(module).SOURCE for module in TASK_SOURCES.values())
