"""The engine of an evaluation: plain transformers in the stage's process, or a vLLM server that the stage starts.

In the process, models compute in fp32 on one core, and results are bitwise reproducible. A server computes in the data
type of the exported weights, on GPUs if there are any, and adds in an order of its own: its results are those of the
process up to rounding. No torch at import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import LongLine, Range
from pipeline.core.stage import Config, Promise, added, operational
from stages.generation import vllm_server
from stages.mcore import gpu_environment

if TYPE_CHECKING:
    import torch


class Engine(Config):
    """The engine that computes the evaluation of a model."""

    kind: Literal["in-process", "vllm"] = Field(default="in-process")
    """in-process: transformers in fp32 on a core, bitwise reproducible; vllm: a server"""
    gpus: Annotated[int, Range(0, 1024)] = operational(0)
    """GPUs of one node that a server's model is spread over (tensor parallelism); 0: it computes on cores"""
    options: tuple[LongLine, ...] = operational((), max_length=100)
    """additional command-line options of the vLLM server"""

    @model_validator(mode="after")
    def _effective(self) -> Engine:
        # A setting without effect is refused, as everywhere in a recipe.
        unused = [name for name in ("gpus", "options") if getattr(self, name)]
        if self.kind == "in-process" and unused:
            raise ValueError(
                f"{unused[0]} has no effect with kind = in-process, which starts no server; leave it out, "
                "or set kind = vllm"
            )
        return self

    @property
    def promise(self) -> Promise:
        """The promise of a stage with this engine."""
        return "bitwise" if self.kind == "in-process" else "numeric"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that computes with it: those of a GPU, which a server's process chooses itself."""
        # A server's process gets its environment from `vllm_server.environment`.
        return gpu_environment.variables() if self.kind == "in-process" else {}

    @property
    def lack(self) -> str | None:
        """The requirement that this machine lacks to compute with it, in one sentence; None if it lacks none."""
        return self.lack_of(SETTING)

    def lack_of(self, setting: str) -> str | None:
        """Returns `lack` of the engine that this setting of a recipe chooses."""
        return vllm_server.missing(setting) if self.kind == "vllm" else None

    def stated(self) -> dict[str, str]:
        """Returns the entries of a scores.json about it.

        A server has `engine`, the package of vLLM with its version; the stage's process has none.

        Raises:
            MachineError: Its environment does not say.
        """
        return {} if self.kind == "in-process" else {"engine": vllm_server.version(SETTING)}


# The setting of a recipe that chooses the engine, for messages.
SETTING = "evaluation.engine"


def engine_field() -> Any:
    """Returns the field of a stage's config: without a value it is left out of the key."""
    return added(Engine())


class LanguageModel(ABC):
    """An exported model, as evaluations ask it. All texts are token ids."""

    # Tokens of the longest row that it was made for.
    context: int

    @abstractmethod
    def bits(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Returns minus log2 of the probability of ids[start:] after ids[:start], for each (ids, start).

        A first token comes after a lone end-of-document token, all others without it; no tokens have 0 bits.
        """

    @abstractmethod
    def continue_greedily(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Returns the likeliest continuation of each prompt, up to the end-of-document token or to so many tokens."""

    @abstractmethod
    def likeliest(self, ids: Sequence[int], count: int) -> list[int]:
        """Returns the likeliest tokens at the last `count` positions, each after all the given tokens before it."""

    @abstractmethod
    def token_bits(self, ids: Sequence[int]) -> torch.Tensor:
        """Returns the bits of every token but the first, in the context of those before it, [len(ids) - 1]."""

    def close(self) -> None:  # noqa: B027 - a model in the process holds nothing
        """Ends what it has started."""
