"""The interfaces of the RL loop: task sources provide tasks, samplers answer their prompts, verifiers score the
answers.

Each has a registry, which names its modules: stages/rl/rollout/task_sources/registry.py, stages/rl/samplers/registry.py
and stages/rl/rewards/registry.py. Nothing heavy is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypedDict, TypeVar

from pipeline.core.errors import MachineError
from pipeline.core.stage import Config, Inputs
from stages.scorers import answer_of

if TYPE_CHECKING:
    from stages.rl.weights import Weights

Row = Mapping[str, Any]
"""A task in its stored and published form, NeMo Gym's row format: `responses_create_params` with the messages of
`input`, and the verifier's own fields beside it; plus `id`, `verifier` (its name), `kind` and `level`."""


def to_row(
    id: str, prompt: str | Sequence[Mapping[str, str]], /, verifier: str, kind: str, level: int, **fields: Any
) -> dict[str, Any]:
    """A task in NeMo Gym's row format. prompt: the user's question, or the messages up to it. fields: the verifier's
    own; one may also be called `prompt`."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    params = {"input": messages}
    return {"id": id, "responses_create_params": params, "verifier": verifier, "kind": kind, "level": level, **fields}


def bin_of(row: Row) -> str:
    """The bin of tasks of one kind and level that a task belongs to."""
    return f"{row['kind']}/{row['level']}"


def question(row: Row) -> str:
    """The user's question: the content of the last message."""
    return str(row["responses_create_params"]["input"][-1]["content"])


@dataclass(frozen=True)
class Prompt:
    """Token ids of a rendered chat up to the assistant's turn, and the seed of its answer."""

    ids: tuple[int, ...]
    seed: int


class ToolCall(TypedDict):
    """A call in an answer. request: the text of the model between the tags; tool: the name that it gives, empty if it
    cannot be read; status: `ok` or what went wrong; result: the text that the model was given."""

    request: str
    tool: str
    status: str
    result: str


class Turn(TypedDict):
    """A turn of an answer. sampled: its tokens, which the policy drew; calls: those in it that were answered; appended:
    the tokens after it that the policy did not draw, which are the results in the chat template."""

    sampled: int
    calls: list[ToolCall]
    appended: int


@dataclass(frozen=True)
class Completion:
    """A sampler's output: token ids with the stop token, if one came, and the log-probability of each under the
    distribution that it was drawn from (temperature applied, nothing cut off). routes: the experts of its tokens, as
    stages/rl/rollout/routes.py records them, if the sampler was asked for them. versions: the digest of the policy and
    the number of tokens that it drew, in their order; empty if the weights have no digest.

    turns: of an answer that may call tools, which several outputs of a sampler make up. Its ids are all tokens after
    the question, and those that the policy did not draw have the log-probability 0."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    routes: bytes | None = None
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

    config: the content of config.json; its `dtype` is the trainer's. stops: ids of the tokens that end an answer.
    folder: for files of the sampler, in the stage's work folder. routes: whether completions are to have routes. note:
    writes a line of the stage's log.
    """

    config: Mapping[str, Any]
    stops: Sequence[int]
    folder: Path
    settings: SamplingSettings
    routes: bool = False
    note: Callable[[str], None] = print


class AnswerGenerator(Protocol):
    """A model that answers prompts: a sampler, or an exported model that is evaluated."""

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """As `Sampler.generate`."""

    def close(self) -> None:
        """As `Sampler.close`."""


class Sampler(ABC):
    """Draws completions at temperature 1. Not collective: one process holds it.

    An asynchronous phase calls it from several threads. Weights may change while it draws: the tokens after the change
    are of the new policy, given all tokens before. A sampler may also have `load` wait for the answers."""

    serves_many: ClassVar[bool] = False
    """Whether calls that overlap are drawn together, and not one after the other."""

    @classmethod
    @abstractmethod
    def create(cls, context: SamplerContext) -> Self:
        """Creates the sampler of a phase. Raises AtomError if a requirement is missing."""

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Loads a policy's weights: a mapping by their Hugging Face names, with the policy's digest and, if they are in
        files, the folder."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """One completion for each prompt, in their order. greedy: of the likeliest tokens; log-probabilities are then
        those at temperature 1."""

    @abstractmethod
    def close(self) -> None:
        """Frees what it holds, child processes included."""


@dataclass(frozen=True)
class Response:
    """An answer in the form for verifiers.

    text: the complete text, of an answer in turns that of the last one, with special tokens by name, without the stop
    token. answer: the text after the reasoning, or all of it if there is none. finished: whether it ended by itself; an
    unfinished answer gets no credit. earlier: the text of each turn before, and its calls of tools.
    """

    text: str
    answer: str
    finished: bool
    earlier: tuple[tuple[str, Sequence[ToolCall]], ...] = ()

    @classmethod
    def parse(cls, text: str, finished: bool) -> Response:
        """Splits off the reasoning. An unclosed reasoning leaves no answer."""
        return cls(text, answer_of(text), finished)


Answer = tuple[Row, Response]
"""A task and an answer to it."""

Parts = dict[str, float]
"""Parts of a reward by name, each finite; `reward` is the total. `task`, if present, is 1 for an answer that does the
task and 0 otherwise: cards compare it with the reward, and an answer with 0 wins no comparison."""


class VerifierFailed(MachineError):
    """A verifier could not score: it crashed, timed out or is unreachable. Never a reward of 0."""


class ChatTokenizer(Protocol):
    """The policy's tokenizer and the ids of its special tokens. tokenizer: a tokenizers.Tokenizer."""

    tokenizer: Any
    pad: int
    end: int
    turn_end: int

    def encode_question(self, text: str) -> list[int]:
        """The token ids of a question up to the assistant's turn."""

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text, in which names of special tokens are ordinary text."""


class NoSettings(Config):
    """The settings of a verifier without settings."""


SettingsT = TypeVar("SettingsT", bound=Config)


@dataclass(frozen=True)
class VerifierContext(Generic[SettingsT]):
    """The arguments for constructing a verifier. settings: the recipe's, validated; inputs: the artifacts of the stage;
    chat: the policy's tokenizer."""

    settings: SettingsT
    inputs: Inputs = field(default_factory=dict)
    chat: ChatTokenizer | None = None


class Verifier(ABC):
    """A reward function: scores answers. The same row and response give the same parts."""

    name: ClassVar[str]
    """Its name in rows, recipes and the registry."""
    Settings: ClassVar[type[Config]] = NoSettings
    """The settings of its execution in a recipe. They are no part of a key, so they must not change a score."""
    version: str
    """Published beside every score; it changes when a score may."""

    def __init__(self, context: VerifierContext[Any]) -> None:  # noqa: B027 - many need nothing of it
        """Raises AtomError where a requirement is missing."""

    @classmethod
    def missing(cls) -> str | None:
        """The requirement that this machine lacks (a package, the sandbox), as a sentence with the remedy."""
        return None

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Answers in the form that it reads which solve nothing, by what they are: beside those of
        stages/rl/rollout/probes.py, they show what can be earned without solving a task."""
        return {}

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """The parts of each answer's reward, in order. Every answer (empty, garbage, huge, hostile) has a reward. An
        unfinished one has the reward 0.

        Raises VerifierFailed in a sentence with the verifier, and with the row unless the machine is the cause.
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
        """The bins that it fills, as `<kind>/<level>`."""

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        """Its tasks. seed: the recipe's; excluded: questions of evaluation items, which the stage leaves out, and which
        a source can replace. Raises RecipeError for settings with too few tasks."""
