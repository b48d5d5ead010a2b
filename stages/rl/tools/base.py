"""The interface of a tool that a model calls while it answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.core.errors import MachineError
from pipeline.core.stage import Config, Inputs, Promise
from stages.tasks.rows import Row


class ToolFailed(MachineError):
    """A tool could not answer through no fault of the call. It ends the phase, and is never a result."""


@dataclass(frozen=True)
class Result:
    """The result of a call. status: `ok`, or why there is no more (`error`, `timeout`, ...); text: for the model."""

    status: str
    text: str


@dataclass(frozen=True)
class Call:
    """A call that a tool can answer. tool: its name in the registry; name: of the function; row: the task; before: the
    calls of the same answer that this tool answers before it, in order."""

    tool: str
    name: str
    arguments: Mapping[str, Any]
    row: Row
    before: Sequence[Call] = ()


class RunningTool(Protocol):
    """A tool that answers calls."""

    def run(self, calls: Sequence[Call]) -> Sequence[Result]:
        """The result of each call, in order. Whatever the arguments are, there is
        one, within bounds of time and memory that the tool sets. Raises ToolFailed where the machine is at fault."""

    def close(self) -> None:
        """Frees what it holds, child processes included."""


class Tool(Config):
    """The settings of a tool in a recipe. A derived class has a field `tool` with the name as its only value; its
    docstring is the description in [configuration](docs/configuration.md)."""

    tool: str
    description: ClassVar[str] = ""
    """What it does, for the model."""
    parameters: ClassVar[Mapping[str, str]] = {}
    """{argument: what it is, for the model}. All are texts, and all are required."""
    promise: ClassVar[Promise] = "bitwise"
    """Whether equal calls have equal results."""
    inputs: ClassVar[Mapping[str, str]] = {}
    """{role: node of the graph} of the artifacts that it reads."""

    def missing(self) -> str | None:
        """The requirement that this machine lacks, as a sentence with the remedy."""
        return None

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of the data recipe that the settings name."""
        return ()

    @abstractmethod
    def open(self, inputs: Inputs, folder: Path) -> RunningTool:
        """Starts the tool. inputs: the artifacts of the stage, by the roles of `inputs`; folder: for its files, emptied
        before. Raises AtomError where a requirement is missing."""

    def functions(self, row: Row) -> list[dict[str, Any]]:
        """The JSON schemas of the functions that it gives a task, each with name, description and parameters: one with
        the name of the tool and texts as arguments."""
        properties = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return [{"name": self.tool, "description": self.description, "parameters": parameters}]

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Why it cannot take the arguments, as a sentence for the model."""
        if arguments.keys() != self.parameters.keys():
            return f"{self.tool} takes the arguments {', '.join(self.parameters)}"
        if not all(isinstance(value, str) for value in arguments.values()):
            return f"the arguments of {self.tool} are texts"
        return None
