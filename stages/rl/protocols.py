"""The interfaces of the RL loop: task sources provide tasks, and verifiers score the answers of a sampler.

Each has a registry, which names its modules: stages/rl/rollout/task_sources/registry.py and
stages/rl/rewards/registry.py. Nothing heavy is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pipeline.core.errors import MachineError
from pipeline.core.stage import Config, Inputs
from stages.generation.protocols import ToolCall
from stages.scorers import answer_of
from stages.tasks.rows import Row


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

    def encode_question(self, text: str) -> list[int]:
        """Returns the token ids of a question up to the assistant's turn."""

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

        Like those of stages/rl/rollout/probes.py, they show what can be earned without solving a task.
        """
        return {}

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


class TaskSource(Protocol):
    """A source of tasks: a Config in a recipe, whose field `source` has the name in the registry."""

    @property
    def source(self) -> str: ...

    @property
    def verifier(self) -> str:
        """The name of the verifier that scores the answers."""

    @property
    def acknowledged_reward(self) -> float | None:
        """The mean reward up to which its tasks are used although an answer that solves nothing earns it."""

    def bins(self) -> list[str]:
        """Returns the bins that it fills, as `<kind>/<level>`."""

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        """Yields its tasks.

        Args:
            seed: The recipe's.
            excluded: Questions of evaluation items, which the stage leaves out, and which a source can replace.

        Raises:
            RecipeError: The settings give too few tasks.
        """
