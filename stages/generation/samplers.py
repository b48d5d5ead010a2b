"""The samplers by name, and the models of evaluations. A new sampler is a file in this folder and a line here.

The file defines a class derived from `Sampler` (stages/generation/protocols.py). It may import torch, because it is
imported when a phase starts to draw; the data for a plan is stated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.core.extensions import extend
from pipeline.core.stage import Promise, ServerPlace
from stages.generation import server_jobs, vllm_server
from stages.generation.engine import SETTING, Engine, LanguageModel
from stages.generation.protocols import AnswerGenerator, Sampler, SamplerContext, SamplingSettings


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler, and what a plan needs to know of it."""

    sampler: str  # its class, as `module:name`
    promise: Promise  # of a stage that draws with it
    apart: bool = False  # draws in processes of its own, which read the weights from files
    # the reason why it cannot work here with the recipe's settings; called before anything starts, without torch
    obstacle: Callable[[SamplingSettings], str | None] = lambda settings: None
    serve: Callable[[SamplingSettings, ServerPlace], None] | None = None  # runs a server in a job of its own


SAMPLERS = {
    "in-process": SamplerEntry("stages.generation.in_process:InProcess", promise="bitwise"),
    # vLLM adds in an order of its own.
    "vllm": SamplerEntry(
        "stages.generation.vllm_sampler:VllmServer",
        promise="numeric",
        apart=True,
        obstacle=vllm_server.obstacle,
        serve=server_jobs.serve,
    ),
}
extend("samplers", SAMPLERS, load=True)


def takes_servers(settings: SamplingSettings) -> bool:
    """Returns True if servers in jobs of their own can draw: not if the recipe names some that others started."""
    return SAMPLERS[settings.kind].serve is not None and not settings.url


def serve(settings: SamplingSettings, place: ServerPlace) -> None:
    """Runs a server until the stage has ended.

    Raises:
        MachineError: The server dies.
        AtomError: A requirement is missing.
    """
    function = SAMPLERS[settings.kind].serve
    assert function is not None, "only for samplers that take servers"
    function(settings, place)


def make_sampler(name: str, context: SamplerContext) -> Sampler:
    """Returns the sampler of that name.

    Raises:
        AtomError: A requirement is missing.
    """
    sampler: type[Sampler] = resolve_name(SAMPLERS[name].sampler)
    return sampler.create(context)


def open_model(engine: Engine, folder: Path, tokenizer: Any, work: Path, longest: int = 0) -> LanguageModel:
    """Returns the model of an exported folder.

    Args:
        engine: Engine that computes with the model.
        folder: Folder of the exported model.
        tokenizer: Tokenizer of the model.
        work: Folder for the log of a server.
        longest: Tokens of the longest row that will be read, if that is more than the model's context.

    Raises:
        AtomError: A server cannot start.
    """
    if engine.kind == "vllm":
        # Imported here, so that a plan needs no torch.
        from stages.generation.vllm_model import Client, ServedModel

        return ServedModel(Client.start(engine, folder, work, longest), tokenizer)
    from stages.generation.transformers_model import TransformersModel

    return TransformersModel.load(folder, tokenizer)


def open_sampler(
    engine: Engine, folder: Path, stops: Sequence[int], max_new_tokens: int, work: Path, setting: str = SETTING
) -> AnswerGenerator:
    """Returns what draws answers of an exported model at temperature 1.

    Args:
        engine: Engine that draws.
        folder: Folder of the exported model.
        stops: Ids of the tokens that end an answer.
        max_new_tokens: Maximum number of tokens of an answer.
        work: Folder for the log of a server.
        setting: Setting of the recipe that chose the engine, for messages.
    """
    if engine.kind == "vllm":
        from stages.generation.vllm_model import Client, ServedSampler

        return ServedSampler(Client.start(engine, folder, work, setting=setting), stops, max_new_tokens)
    from stages.generation.in_process import InProcess

    return InProcess(folder, stops, max_new_tokens)
