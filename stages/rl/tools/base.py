"""The interface of a tool that a model calls while it answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.core.errors import MachineError
from pipeline.core.stage import Config, Inputs, Promise


class ToolFailed(MachineError):
    """A tool could not answer through no fault of the call. It ends the phase, and is never a result."""


@dataclass(frozen=True)
class Result:
    """The result of a call. status: `ok`, or why there is no more (`error`, `timeout`, ...); text: for the model."""

    status: str
    text: str


class RunningTool(Protocol):
    """A tool that answers calls."""

    def run(self, calls: Sequence[Mapping[str, str]]) -> list[Result]:
        """The result of each call, given its arguments, in order. Whatever the arguments are, there is a result, within
        bounds of time and memory that the tool sets. Raises ToolFailed where the machine is at fault."""

    def close(self) -> None:
        """Frees what it holds, child processes included."""


class Tool(Config):
    """The settings of a tool in a recipe. A derived class has a field `tool` with the name as its only value; its
    docstring is the description in [configuration](docs/configuration.md)."""

    tool: str
    description: ClassVar[str]
    """What it does, for the model."""
    parameters: ClassVar[Mapping[str, str]]
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

    def function(self) -> dict[str, Any]:
        """Its JSON schema, in the form of OpenAI's chat API."""
        properties = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.tool, "description": self.description, "parameters": parameters},
        }
