"""What the stages need that run an exported model in one process. No torch: `atom plan` imports this file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, Estimate
from stages.models.base import ModelConfig

CPU_FLOPS = 2e10
"""FLOP/s of a core that draws answers or reads documents in fp32, as in `stages/rl`."""
START_SECONDS = 10.0
BASE_BYTES = 700_000_000
"""Memory of PyTorch and transformers, and of a batch of a small model."""
QUESTION_TOKENS, DOCUMENT_TOKENS = 100, 1000
"""Assumed length of a question, and of a held-out document."""


class Expected(Config):
    """The model and the tokens that are expected, for `atom plan` alone."""

    parameters: Annotated[int, Range(1, 1e15)] = Field(description="parameters of the model")
    active: Annotated[int, Range(1, 1e15)] = Field(description="parameters that a token uses")
    tokens: Annotated[int, Range(0, 1e15)] = Field(description="tokens that are read or drawn")


def expected(model: ModelConfig, padded_vocab_size: int, tokens: int) -> Expected:
    parameters = model.parameters(padded_vocab_size)
    return Expected(parameters=parameters["total"], active=parameters["active"], tokens=tokens)


def estimate(expected: Expected | None, models: int = 1) -> Estimate:
    """The resources of a stage that holds `models` such models in fp32, one after the other. Weights are read from a
    mapped file, converted a tensor at a time."""
    if expected is None:
        return Estimate(memory_bytes=BASE_BYTES, disk_bytes=0)
    flops = 2.0 * expected.active * expected.tokens * models
    return Estimate(
        cpu_seconds=START_SECONDS + flops / CPU_FLOPS,
        flops=flops,
        tokens=expected.tokens * models,
        memory_bytes=BASE_BYTES + 4 * expected.parameters,
        disk_bytes=8 * expected.tokens,
    )
