"""Opens an exported model for an evaluation, by the engine of the recipe. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.generation.engine import SETTING, Engine, LanguageModel

if TYPE_CHECKING:
    from stages.generation.protocols import AnswerGenerator


def open_model(engine: Engine, folder: Path, tokenizer: Any, work: Path, longest: int = 0) -> LanguageModel:
    """The model of an exported folder. work: for the log of a server. longest: tokens of the longest row that will be
    read, if that is more than the model's context. Raises AtomError if a server cannot start."""
    if engine.kind == "vllm":
        from stages.generation.vllm_model import Client, ServedModel

        return ServedModel(Client.start(engine, folder, work, longest), tokenizer)
    from stages.generation.transformers_model import TransformersModel

    return TransformersModel.load(folder, tokenizer)


def open_sampler(
    engine: Engine, folder: Path, stops: Sequence[int], max_new_tokens: int, work: Path, setting: str = SETTING
) -> AnswerGenerator:
    """What draws answers of an exported model at temperature 1. work: for the log of a server. setting: the engine's
    in the recipe, for messages."""
    if engine.kind == "vllm":
        from stages.generation.vllm_model import Client, ServedSampler

        return ServedSampler(Client.start(engine, folder, work, setting=setting), stops, max_new_tokens)
    from stages.generation.in_process import InProcess

    return InProcess(folder, stops, max_new_tokens)
