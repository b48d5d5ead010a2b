"""The section `tools` of a phase: the tools that its tasks offer, and the bounds of an answer that calls them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, model_validator

from pipeline.core.bounds import Range, Words
from pipeline.core.errors import AtomError
from pipeline.core.extensions import imported
from pipeline.core.stage import Config
from stages.rl.protocols import TOOLS, Tool
from stages.tasks import Row

if TYPE_CHECKING:
    AnyTool = Tool
else:
    # Here and not in the registry, whose classes the tools themselves import.
    AnyTool = Annotated[Union[tuple(map(imported, TOOLS.values()))], Field(discriminator="tool")]  # noqa: UP007


class Tools(Config):
    """Tools that the model may call while it answers, in turns."""

    offered: Annotated[tuple[AnyTool, ...], Field(min_length=1, max_length=100)]
    """tools, each once"""
    kinds: tuple[Annotated[str, Words(100)], ...] = Field((), max_length=1000)
    """kinds of tasks that offer them; empty: all"""
    max_turns: Annotated[int, Range(2, 1000, "usual: 2 to 20")] = 4
    """maximum turns of an answer, each of at most sampling.max_new_tokens; the last calls no tool"""
    max_result_characters: Annotated[int, Range(1, 1e7)] = 2000
    """maximum characters of a result; a longer one is cut, with a mark"""

    @model_validator(mode="after")
    def _check_distinct(self) -> Tools:
        counts = Counter(tool.tool for tool in self.offered)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"tools.offered has {twice[0]} twice, and a call names one; give each tool once")
        return self

    def functions(self, row: Row) -> dict[str, tuple[Tool, dict[str, Any]]]:
        """Returns {name: (tool, JSON schema)} of the functions that a task offers.

        Raises:
            AtomError: Two tools give a function of one name.
        """
        functions: dict[str, tuple[Tool, dict[str, Any]]] = {}
        if self.kinds and row["kind"] not in self.kinds:
            return functions
        for tool in self.offered:
            for function in tool.functions(row):
                if (name := function["name"]) in functions:
                    raise AtomError(f"task {row.get('id')} offers {name} twice, and a call names one; leave one out")
                functions[name] = tool, function
        return functions

    def schemas(self, row: Row) -> list[dict[str, Any]]:
        """Returns the functions that a task offers, in the form of OpenAI's chat API."""
        return [{"type": "function", "function": schema} for _, schema in self.functions(row).values()]
