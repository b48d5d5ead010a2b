"""What the stages need that run an exported model, in their process or by a vLLM server. No torch: `atom plan` imports
this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, Estimate
from pipeline.core.store import once
from stages.generation import vllm_server
from stages.generation.engine import Engine
from stages.models.base import ModelConfig

CPU_FLOPS = 2e10
"""FLOP/s of a core that draws answers or reads documents in fp32, as in `stages/rl`."""
GPU_FLOPS = 1e14
"""FLOP/s of a GPU of a vLLM server, a tenth of an H100's peak in bf16: assumed, as no GPU has run an evaluation yet."""
READ_BYTES = 1e9
"""Bytes of weights that a server reads in a second from the shared file system."""
START_SECONDS, SERVER_SECONDS = 10.0, 120.0
"""Of a stage's process, and of a vLLM server without its weights."""
SHARD_SECONDS = 3600.0
FILES = 8
"""Of an artifact, at most: tables, scores and the manifest. Shards leave none in it."""
BASE_BYTES = vllm_server.PYTHON_BYTES
"""Memory of PyTorch and transformers, and of a batch of a small model."""
QUESTION_TOKENS, DOCUMENT_TOKENS = 100, 1000
"""Assumed length of a question, and of a held-out document."""


class Expected(Config):
    """The model and the tokens that are expected, for `atom plan` alone."""

    parameters: Annotated[int, Range(1, 1e21)] = Field(description="parameters of the model")
    active: Annotated[int, Range(1, 1e21)] = Field(description="parameters that a token uses")
    tokens: Annotated[int, Range(0, 1e15)] = Field(description="tokens that are read or drawn")
    pieces: Annotated[int, Range(1, 1e9)] = Field(1, description="pieces of work that tasks may share")
    weight_bytes: Annotated[int, Range(0, 1e22)] = Field(0, description="bytes of the exported weights")
    served_bytes: Annotated[int, Range(0, 1e22)] = Field(
        0, description="memory of a vLLM server's process beside its weights, on each GPU if it has some"
    )


def expected(
    model: ModelConfig, padded_vocab_size: int, tokens: int, pieces: int = 1, dtype: str = "float32",
    engine: Engine | None = None,
) -> Expected:  # fmt: skip
    """engine: what computes; None: the stage's process."""
    parameters, width = model.parameters(padded_vocab_size), 4 if dtype == "float32" else 2
    served = 0
    if engine is not None and engine.kind == "vllm":
        served = vllm_server.memory_beside_weights(model, padded_vocab_size, width, engine.gpus)
    return Expected(
        parameters=parameters["total"], active=parameters["active"], tokens=tokens, pieces=pieces,
        weight_bytes=width * parameters["total"], served_bytes=served,
    )  # fmt: skip


def shards(expected: Expected | None, models: int = 1, engine: Engine | None = None) -> int:
    """Shards of about an hour, but none without a piece of its own. The pieces are the same for any number of shards,
    so this estimate has no part in the bytes."""
    if expected is None:
        return 1
    return max(1, min(expected.pieces, math.ceil(models * _flops(expected) / _rate(engine) / SHARD_SECONDS)))


def _flops(expected: Expected) -> float:
    return 2.0 * expected.active * expected.tokens


def _rate(engine: Engine | None) -> float:
    return CPU_FLOPS if engine is None or not engine.gpus else engine.gpus * GPU_FLOPS


def estimate(expected: Expected | None, models: int = 1, engine: Engine | None = None) -> Estimate:
    """The resources of a stage that holds `models` such models, one after the other: in its process in fp32, whose
    weights are read from a mapped file and converted a tensor at a time; or on a vLLM server as they were exported.

    memory_bytes is that of one GPU if the engine has some.
    """
    if expected is None:
        return Estimate(memory_bytes=BASE_BYTES, disk_bytes=0)
    count = shards(expected, models, engine)
    flops, starts = _flops(expected) * models, count + (count > 1)
    estimate = Estimate(
        cpu_seconds=START_SECONDS * starts + flops / CPU_FLOPS,
        serial_seconds=START_SECONDS if starts > 1 else None,
        flops=flops,
        tokens=expected.tokens * models,
        memory_bytes=BASE_BYTES + 4 * expected.parameters,
        disk_bytes=8 * expected.tokens,
        files=FILES,
    )
    if engine is None or engine.kind == "in-process":
        return estimate
    loads = models * count * (SERVER_SECONDS + expected.weight_bytes / READ_BYTES)
    if not engine.gpus:
        memory = vllm_server.memory_on_cores(expected.weight_bytes, expected.served_bytes)
        return replace(estimate, cpu_seconds=(estimate.cpu_seconds or 0) + loads, memory_bytes=memory)
    on_clock = START_SECONDS * starts + loads + flops / _rate(engine)
    return replace(
        estimate, gpu_seconds=engine.gpus * on_clock, assumed=ASSUMED, host_bytes=vllm_server.host_memory(engine.gpus),
        memory_bytes=expected.weight_bytes // engine.gpus + expected.served_bytes,
    )  # fmt: skip


ASSUMED = (
    f"evaluation by vLLM at {GPU_FLOPS / 1e12:.0f} TFLOP/s a GPU, reading weights at {READ_BYTES / 1e9:.0f} GB/s; "
    "not measured"
)


def of_engine(models: int = 1) -> dict[str, Any]:
    """The functions of a Stage whose config has `engine` and `expected`. models: as for `estimate`."""
    return {
        "estimate": lambda config: estimate(config.expected, models, config.engine),
        "shards": lambda config: shards(config.expected, models, config.engine),
        "gpus": lambda config: config.engine.gpus,
        "environment": lambda config: config.engine.environment,
        "promise": lambda config: config.engine.promise,
        "lack": lambda config: config.engine.lack,
    }


M = TypeVar("M")


@dataclass(frozen=True)
class Piece(Generic[M]):
    """name: of its file in the work folder; make(model): its result, as plain JSON; size: its items."""

    name: str
    make: Callable[[M], Any]
    size: int = 1


def compute(pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M]) -> Iterator[Any]:
    """The results of the pieces in order; those that `work` keeps are not computed again. load: gives the model, which
    is loaded for the first piece that is missing."""
    model = cache(load)

    def make(piece: Piece[M]) -> Any:
        return piece.make(model())

    for piece in pieces:
        yield once(work / f"{piece.name}.json", partial(make, piece))


def compute_shard(pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M], shard: int, shards: int) -> None:
    """Leaves the results of one shard's pieces in `work`: every `shards`-th."""
    for _ in compute(pieces[shard::shards], work, load):
        pass


def count(items: int, size: int) -> int:
    """The number of pieces of `size` items."""
    return -(-items // size)
