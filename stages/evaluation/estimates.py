"""What the stages need that run an exported model in one process. No torch: `atom plan` imports this file."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, Estimate
from stages.models.base import ModelConfig

CPU_FLOPS = 2e10
"""FLOP/s of a core that draws answers or reads documents in fp32, as in `stages/rl`."""
START_SECONDS = 10.0
SHARD_SECONDS = 3600.0
FILES = 8
"""Of an artifact, at most: tables, scores and the manifest. Shards leave none in it."""
BASE_BYTES = 700_000_000
"""Memory of PyTorch and transformers, and of a batch of a small model."""
QUESTION_TOKENS, DOCUMENT_TOKENS = 100, 1000
"""Assumed length of a question, and of a held-out document."""


class Expected(Config):
    """The model and the tokens that are expected, for `atom plan` alone."""

    parameters: Annotated[int, Range(1, 1e15)] = Field(description="parameters of the model")
    active: Annotated[int, Range(1, 1e15)] = Field(description="parameters that a token uses")
    tokens: Annotated[int, Range(0, 1e15)] = Field(description="tokens that are read or drawn")
    pieces: Annotated[int, Range(1, 1e9)] = Field(1, description="pieces of work that tasks may share")


def expected(model: ModelConfig, padded_vocab_size: int, tokens: int, pieces: int = 1) -> Expected:
    parameters = model.parameters(padded_vocab_size)
    return Expected(parameters=parameters["total"], active=parameters["active"], tokens=tokens, pieces=pieces)


def shards(expected: Expected | None) -> int:
    """Shards of about an hour, but none without a piece of its own. The pieces are the same for any number of shards,
    so this estimate has no part in the bytes."""
    if expected is None:
        return 1
    return max(1, min(expected.pieces, math.ceil(_flops(expected) / CPU_FLOPS / SHARD_SECONDS)))


def _flops(expected: Expected) -> float:
    return 2.0 * expected.active * expected.tokens


def estimate(expected: Expected | None, models: int = 1) -> Estimate:
    """The resources of a stage that holds `models` such models in fp32, one after the other. Weights are read from a
    mapped file, converted a tensor at a time."""
    if expected is None:
        return Estimate(memory_bytes=BASE_BYTES, disk_bytes=0)
    flops, starts = _flops(expected) * models, shards(expected) + (shards(expected) > 1)
    return Estimate(
        cpu_seconds=START_SECONDS * starts + flops / CPU_FLOPS,
        serial_seconds=START_SECONDS if starts > 1 else None,
        flops=flops,
        tokens=expected.tokens * models,
        memory_bytes=BASE_BYTES + 4 * expected.parameters,
        disk_bytes=8 * expected.tokens,
        files=FILES,
    )
