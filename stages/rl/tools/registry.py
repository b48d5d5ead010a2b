"""The tools that a model can call while it answers: their interface, and their registry.

A new tool is a file in this folder and a line in `TOOLS`. The file defines a class derived from `Tool`, whose field
`tool` has the name as its only value. stages/rl/tools/settings.py imports all of them, for the recipe's schema.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.core.errors import MachineError
from pipeline.core.extensions import extend
from pipeline.core.stage import Config, Inputs, Promise
from stages.tasks.rows import Row

# {tool: its class}.
TOOLS = {
    "python": "stages.rl.tools.python_program:PythonTool",
    "nemo-gym": "stages.rl.tools.gym_environment:GymTool",
    "search": "stages.rl.tools.corpus_search:SearchTool",
}
extend("tools", TOOLS)


class ToolFailed(MachineError):
    """A tool could not answer through no fault of the call. It ends the phase, and is never a result."""


@dataclass(frozen=True)
class Result:
    """The result of a call.

    Attributes:
        status: `ok`, or the reason why there is no more (`error`, `timeout`, ...).
        text: Text for the model.
    """

    status: str
    text: str


@dataclass(frozen=True)
class Call:
    """A call that a tool can answer.

    Attributes:
        tool: Name of the tool in the registry.
        name: Name of the function.
        arguments: Arguments by name.
        row: The task.
        before: Earlier calls of the same answer that this tool answers, in order.
    """

    tool: str
    name: str
    arguments: Mapping[str, Any]
    row: Row
    before: Sequence[Call] = ()


class RunningTool(Protocol):
    """A tool that answers calls."""

    def run(self, calls: Sequence[Call]) -> Sequence[Result]:
        """Returns the result of each call, in order.

        There is a result for any arguments, within bounds of time and memory that the tool sets.

        Raises:
            ToolFailed: The machine is at fault.
        """

    def close(self) -> None:
        """Frees what it holds, child processes included."""


class Tool(Config):
    """The settings of a tool in a recipe. The docstring of a tool is its description in docs/configuration.md."""

    tool: str
    # Description of the tool for the model.
    description: ClassVar[str] = ""
    # {argument: what it is, for the model}. All are texts, and all are required.
    parameters: ClassVar[Mapping[str, str]] = {}
    # "bitwise" if equal calls have equal results.
    promise: ClassVar[Promise] = "bitwise"
    # {role: node of the graph} of the artifacts that it reads.
    inputs: ClassVar[Mapping[str, str]] = {}

    def missing(self) -> str | None:
        """Returns the requirement that this machine lacks, as a sentence with the remedy."""
        return None

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of the data recipe that the settings name."""
        return ()

    @abstractmethod
    def open(self, inputs: Inputs, folder: Path) -> RunningTool:
        """Starts the tool.

        Args:
            inputs: Artifacts of the stage, by the roles of `inputs`.
            folder: Folder for files of the tool; it is empty.

        Raises:
            AtomError: A requirement is missing.
        """

    def functions(self, row: Row) -> list[dict[str, Any]]:
        """Returns the JSON schemas of the functions that it gives a task: by default one with the tool's name."""
        properties = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return [{"name": self.tool, "description": self.description, "parameters": parameters}]

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Returns the reason why it cannot take the arguments, as a sentence for the model."""
        if arguments.keys() != self.parameters.keys():
            return f"{self.tool} takes the arguments {', '.join(self.parameters)}"
        if not all(isinstance(value, str) for value in arguments.values()):
            return f"the arguments of {self.tool} are texts"
        return None
