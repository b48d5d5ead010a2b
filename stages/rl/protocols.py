"""The two interfaces of the RL loop: samplers answer prompts, verifiers score answers.

Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.errors import MachineError
from stages.scorers import answer_of

if TYPE_CHECKING:
    import torch

Row = Mapping[str, Any]
"""A task as it is kept and published, in NeMo Gym's row format: `responses_create_params` with the messages of `input`,
and the verifier's own fields beside it; plus `id`, `verifier` (its name), `kind` and `level`."""


def to_row(
    id: str, prompt: str | Sequence[Mapping[str, str]], /, verifier: str, kind: str, level: int, **fields: Any
) -> dict[str, Any]:
    """A task in NeMo Gym's row format. prompt: what the user asks, or the messages up to there. fields: the
    verifier's own, which may be called `prompt` too."""
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
    """Token ids of a rendered chat up to the assistant's turn, and the seed of the one answer that is to be drawn."""

    ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """A sampler's output: token ids with the stop token, if one came, and the log-probability of each under the
    distribution that it was drawn from (temperature applied, nothing cut off)."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Sampler(Protocol):
    """Draws completions. Not collective: one process holds it."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads weights by their Hugging Face names."""

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """One completion for each prompt, in their order. greedy: of the likeliest tokens; log-probabilities are then
        those at temperature 1."""

    def close(self) -> None:
        """Frees what it holds, child processes included."""


@dataclass(frozen=True)
class Response:
    """An answer as a verifier sees it.

    text: the complete text, with special tokens by name, without the stop token. answer: the text after the reasoning,
    or all of it if there is none. finished: whether it ended by itself; a verifier gives no credit to one that did not.
    """

    text: str
    answer: str
    finished: bool

    @classmethod
    def parse(cls, text: str, finished: bool) -> Response:
        """Splits the reasoning off. One that was opened and never closed leaves no answer."""
        return cls(text, answer_of(text), finished)


Parts = dict[str, float]
"""Parts of a reward by name, each finite; `reward` is the whole. `task`, if there, is 1 where what was asked was done
and 0 elsewhere: cards compare it with the reward, and an answer without it wins no comparison."""


class VerifierFailed(MachineError):
    """A verifier could not judge: it crashed, timed out or is unreachable. Never a reward of 0."""


class Verifier(Protocol):
    """Scores answers. The same row and response give the same parts."""

    name: str
    version: str
    runs_code: bool
    """Whether it runs what a model wrote, which needs the sandbox."""

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        """The parts of each answer's reward, in order. An answer of any kind (empty, garbage, huge, hostile) has one.

        Raises VerifierFailed in a sentence that names the verifier, and the row unless the machine is to blame.
        """

    def close(self) -> None:
        """Frees what it holds, child processes included."""
