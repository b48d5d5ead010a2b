"""The interface of a sampler: it answers prompts with token ids and their log-probabilities.

Nothing heavy is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypedDict

if TYPE_CHECKING:
    from stages.generation.weights import Weights


@dataclass(frozen=True)
class Prompt:
    """Token ids of a rendered chat up to the assistant's turn, and the seed of its answer."""

    ids: tuple[int, ...]
    seed: int


class ToolCall(TypedDict):
    """A call in an answer."""

    request: str
    """text of the model between the tags"""
    tool: str
    """name of the tool; empty if the request cannot be read"""
    status: str
    """`ok`, or what went wrong"""
    result: str
    """text that the model received"""


class Turn(TypedDict):
    """A turn of an answer."""

    sampled: int
    """number of its tokens, which the policy generated"""
    calls: list[ToolCall]
    """its calls that were answered"""
    appended: int
    """number of tokens after it that the policy did not generate: the results in the chat template"""


@dataclass(frozen=True)
class Completion:
    """A sampler's output. An answer that may call tools is made of several of them.

    Attributes:
        ids: Token ids with the stop token, if one came; of an answer in turns, all tokens after the question.
        logprobs: Log-probability of each token under the distribution that it was drawn from (temperature applied,
            nothing cut off); 0 for tokens that the policy did not draw.
        finished: True if the answer ended by itself.
        versions: Digest of each policy and the number of tokens that it drew, in order; empty if the weights have no
            digest.
        turns: The turns of an answer that may call tools.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    versions: tuple[tuple[str, int], ...] = ()
    turns: tuple[Turn, ...] | None = None


class SamplingSettings(Protocol):
    """The recipe's section `sampling`."""

    kind: str
    max_new_tokens: int
    url: tuple[str, ...]
    secret: str | None
    options: tuple[str, ...]


@dataclass(frozen=True)
class SamplerContext:
    """The arguments for constructing a sampler.

    Attributes:
        config: The content of config.json; its `dtype` is the trainer's.
        stops: Ids of the tokens that end an answer.
        folder: Folder for files of the sampler, in the stage's work folder.
        settings: The recipe's section `sampling`.
        note: Writes a line of the stage's log.
    """

    config: Mapping[str, Any]
    stops: Sequence[int]
    folder: Path
    settings: SamplingSettings
    note: Callable[[str], None] = print


class AnswerGenerator(ABC):
    """A model that answers prompts: a sampler, or an exported model that is evaluated."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """Returns one completion for each prompt, in their order.

        Args:
            prompts: The prompts, each with the seed of its answer.
            greedy: True for the likeliest tokens; log-probabilities are then those at temperature 1.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what it holds, child processes included."""


class Sampler(AnswerGenerator):
    """Draws completions at temperature 1. Not collective: one process holds it.

    An asynchronous phase calls it from several threads. Weights may change while it draws: the tokens after the change
    are of the new policy, given all tokens before. A sampler may also have `load` wait for the answers.
    """

    # True if calls that overlap are drawn together, and not one after the other.
    serves_many: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def create(cls, context: SamplerContext) -> Self:
        """Creates the sampler of a phase.

        Raises:
            AtomError: A requirement is missing.
        """

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Loads a policy's weights.

        They are a mapping by their Hugging Face names, with the policy's digest and, if they are in files, the folder.
        """
