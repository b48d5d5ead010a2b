"""The tools by name. A new one is a file in this folder and a line here.

The file defines a class derived from `Tool` (base.py) and names it `TOOL`. Its field `tool` has the name as its only
value. All are imported with this module, since the recipe's schema needs them.
"""

from __future__ import annotations

from importlib import import_module

from stages.rl.tools.base import Tool

TOOLS = {
    "python": "stages.rl.tools.python_program",
    "nemo-gym": "stages.rl.tools.gym_environment",
    "search": "stages.rl.tools.corpus_search",
    "recurse": "stages.rl.tools.recursive_call",
}
"""{tool: its module}."""


def tool_classes() -> tuple[type[Tool], ...]:
    """The classes of all tools, in the order of the registry."""
    return tuple(import_module(module).TOOL for module in TOOLS.values())
