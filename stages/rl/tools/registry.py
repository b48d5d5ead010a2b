"""The tools by name. A new one is a file in this folder and a line here.

The file defines a class derived from `Tool` (base.py). Its field `tool` has the name as its only value. All are
imported with this module, since the recipe's schema needs them.
"""

from __future__ import annotations

from pkgutil import resolve_name

from stages.rl.tools.base import Tool

TOOLS = {
    "python": "stages.rl.tools.python_program:PythonTool",
    "nemo-gym": "stages.rl.tools.gym_environment:GymTool",
    "search": "stages.rl.tools.corpus_search:SearchTool",
}
"""{tool: its class}."""


def tool_classes() -> tuple[type[Tool], ...]:
    """Returns the classes of all tools, in the order of the registry."""
    return tuple(map(resolve_name, TOOLS.values()))
