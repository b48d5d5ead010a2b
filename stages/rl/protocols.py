"""The parts of the RL loop that can be added: their interfaces, and the registries that name them.

Verifiers (reward functions) score answers, sources provide tasks, and tools answer the calls of a model. A new one is a
file in rewards/, rollout/task_sources/ or tools/ and a line in VERIFIERS, TASK_SOURCES or TOOLS. The file defines a
class derived from `Verifier`, `TaskSource` or `Tool`; the field `source` or `tool` of the latter two has the name as
its only value. Nothing heavy is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import ValidationError

from pipeline.core.bounds import Range, Share, Words
from pipeline.core.errors import AtomError, MachineError, RecipeError
from pipeline.core.extensions import extend, imported
from pipeline.core.stage import Config, Inputs, operational
from pipeline.graph.recipe import explain
from stages.generation.protocols import ToolCall
from stages.scorers import answer_of
from stages.tasks import Row, right_answer


@dataclass(frozen=True)
class Response:
    """An answer in the form for verifiers.

    Attributes:
        text: The complete text, of an answer in turns that of the last one, with special tokens by name, without the
            stop token.
        answer: The text after the reasoning, or all of it if there is none.
        finished: True if it ended by itself; an unfinished answer gets no credit.
        earlier: The text of each turn before, and its calls of tools.
    """

    text: str
    answer: str
    finished: bool
    earlier: tuple[tuple[str, Sequence[ToolCall]], ...] = ()

    @classmethod
    def parse(cls, text: str, finished: bool) -> Response:
        """Splits off the reasoning. An unclosed reasoning leaves no answer."""
        return cls(text, answer_of(text), finished)


# A task and an answer to it.
Answer = tuple[Row, Response]

# Parts of a reward by name, each finite; `reward` is the total. `task`, if present, is 1 for an answer that does the
# task and 0 otherwise: cards compare it with the reward, and an answer with 0 wins no comparison.
Parts = dict[str, float]


class VerifierFailed(MachineError):
    """A verifier could not score: it crashed, timed out or is unreachable. This never becomes a reward of 0."""


class ChatTokenizer(Protocol):
    """The policy's tokenizer and the ids of its special tokens.

    Attributes:
        tokenizer: A tokenizers.Tokenizer.
    """

    tokenizer: Any
    pad: int
    end: int
    turn_end: int

    def encode_question(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of messages up to the assistant's turn."""

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which names of special tokens are ordinary text."""


class NoSettings(Config):
    """The settings of a verifier without settings."""


SettingsT = TypeVar("SettingsT", bound=Config)


@dataclass(frozen=True)
class VerifierContext(Generic[SettingsT]):
    """The arguments for constructing a verifier.

    Attributes:
        settings: The recipe's, validated.
        inputs: The artifacts of the stage.
        chat: The policy's tokenizer.
    """

    settings: SettingsT
    inputs: Inputs = field(default_factory=dict)
    chat: ChatTokenizer | None = None


class Verifier(ABC):
    """A reward function: scores answers. The same row and response give the same parts."""

    # Its name in rows, recipes and the registry.
    name: ClassVar[str]
    # The settings of its execution in a recipe. They are no part of a key, so they must not change a score.
    Settings: ClassVar[type[Config]] = NoSettings
    # Published beside every score; it changes when a score may.
    version: str

    def __init__(self, context: VerifierContext[Any]) -> None:  # noqa: B027 - many need nothing of it
        """Raises AtomError where a requirement is missing."""

    @classmethod
    def missing(cls) -> str | None:
        """Returns the requirement that this machine lacks (a package, the sandbox), as a sentence with the remedy."""
        return None

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Returns answers that solve nothing, in the form that the verifier reads, each by a description of it.

        Like those of stages/rl/rollout/tasks.py, they show what can be earned without solving a task.
        """
        return {}

    @staticmethod
    def correct_answer(row: Row) -> str | None:
        """Returns a right answer to the row, in the form of a model's answer; None if the row does not tell one."""
        return right_answer(row)

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Returns the parts of each answer's reward, in order.

        Every answer (empty, garbage, huge, hostile) has a reward. An unfinished one has the reward 0.

        Raises:
            VerifierFailed: The verifier cannot score. The sentence names it, and the row unless the machine is the
                cause.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Frees what it holds, child processes included."""


# The verifier that is trained after the tasks are drawn, so that none of its rewards is known.
TRAINED = "reward-model"
# {verifier: its class}. Importing one is cheap; packages are imported when it is constructed.
VERIFIERS = {
    "courtesy": "stages.rl.rewards.frozen_scorer:Courtesy",
    "exact": "stages.rl.rewards.frozen_scorer:Exact",
    "instructions": "stages.rl.rewards.frozen_scorer:Instructions",
    "math-verify": "stages.rl.rewards.pooled_verifier:MathVerify",
    "nemo-gym": "stages.rl.rewards.gym_server:GymServer",
    "python-tests": "stages.rl.rewards.code_verifier:CodeVerifier",
    "reasoning-gym": "stages.rl.rewards.pooled_verifier:ReasoningGym",
    "reward-model": "stages.rl.rewards.reward_model:RewardModel",
}
extend("verifiers", VERIFIERS)


def verifier_class(name: str) -> type[Verifier]:
    """Returns the class of a verifier. Raises RecipeError for an unknown name."""
    if name not in VERIFIERS:
        raise RecipeError(f"no verifier {name!r}; there are {', '.join(sorted(VERIFIERS))}")
    verifier: type[Verifier] = imported(VERIFIERS[name])
    return verifier


def make_verifier(
    name: str,
    settings: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    chat: ChatTokenizer | None = None,
) -> Verifier:
    """Returns the verifier of that name.

    Raises:
        RecipeError: The name or a setting is unknown, or a requirement is missing.
    """
    verifier, validated = _checked(name, settings or {})
    return verifier(VerifierContext(validated, inputs or {}, chat))


def make_verifiers(
    rows: Sequence[Row], inputs: Inputs, chat: ChatTokenizer | None, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Verifier]:
    """Returns the verifiers that tasks name, with their settings by name. Raises as `make_verifier` does."""
    names = sorted({str(row["verifier"]) for row in rows})
    return {name: make_verifier(name, settings.get(name), inputs, chat) for name in names}


def obstacle(names: Iterable[str], settings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the reason why a verifier of these names cannot score here, if any."""
    for name in sorted(set(names)):
        try:
            _checked(name, settings.get(name, {}))
        except AtomError as error:
            return str(error)
    return None


def _checked(name: str, settings: Mapping[str, Any]) -> tuple[type[Verifier], Config]:
    """Returns the class of a verifier and its validated settings, without making one. Raises as `make_verifier`."""
    verifier = verifier_class(name)
    try:
        validated = verifier.Settings.model_validate(settings)
    except ValidationError as error:
        title = f"verifier {verifier.name} with the settings {dict(settings)}"
        raise explain(error, verifier.Settings, title) from None
    if reason := verifier.missing():
        raise RecipeError(reason)
    return verifier, validated


# A level of difficulty.
Level = Annotated[int, Range(0, 1000)]
# A number of tasks.
Count = Annotated[int, Range(1, 1e7)]
# A kind of tasks.
Kind = Annotated[str, Words(64, "name of lower-case letters, digits, '_' and '-'", r"[a-z][a-z0-9_-]*")]
# Fields of a row that this project generates.
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}
# {source of tasks: its class}
TASK_SOURCES = {
    "problems": "stages.rl.rollout.task_sources.procedural_tasks:ProblemTasks",
    "courtesies": "stages.rl.rollout.task_sources.procedural_tasks:CourtesyTasks",
    "instructions": "stages.rl.rollout.task_sources.procedural_tasks:InstructionTasks",
    "reasoning-gym": "stages.rl.rollout.task_sources.procedural_tasks:ReasoningGymTasks",
    "hub": "stages.rl.rollout.task_sources.stored_tasks:HubTasks",
    "hub-prompts": "stages.rl.rollout.task_sources.stored_tasks:HubPrompts",
    "rows": "stages.rl.rollout.task_sources.stored_tasks:FileTasks",
}
extend("task_sources", TASK_SOURCES)


class TaskSource(Config):
    """The settings of a source of tasks in a recipe. Its field `source` has the name in the registry."""

    if TYPE_CHECKING:  # a field of each source, and a field or a constant

        @property
        def source(self) -> str: ...

        @property
        def verifier(self) -> str:
            """The name of the verifier that scores the answers."""

    acknowledged_reward: Share | None = operational(None)
    """mean reward up to which tasks are used although an answer that solves nothing earns it; null: 0.05 above
    chance"""

    @abstractmethod
    def bins(self) -> list[str]:
        """Returns the bins that it fills, as `<kind>/<level>`."""

    @abstractmethod
    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        """Yields its tasks.

        Args:
            seed: The recipe's.
            excluded: Questions of evaluation items, which the stage leaves out, and which a source can replace.

        Raises:
            RecipeError: The settings give too few tasks.
        """


# {tool: its class}.
TOOLS = {
    "python": "stages.rl.tools.python_program:PythonTool",
    "nemo-gym": "stages.rl.tools.gym_environment:GymTool",
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

    def missing(self) -> str | None:
        """Returns the requirement that this machine lacks, as a sentence with the remedy."""
        return None

    @abstractmethod
    def open(self) -> RunningTool:
        """Starts the tool.

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
