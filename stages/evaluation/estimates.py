"""The pieces of an evaluation, which tasks of a job array share, and the resources that it needs.

A piece is a result that is computed apart from all others. A stage fixes its pieces by its config and inputs, so the
artifact has the same bytes however they are dealt out. No torch: `atom plan` imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pipeline.core.bounds import Range
from pipeline.core.stage import TRANSFORMERS, Config, Estimate, Report, operational
from pipeline.core.store import once
from stages.generation import vllm_server
from stages.generation.engine import Engine, engine_field
from stages.models.base import ModelConfig

# FLOP/s of a core that draws answers or reads documents in fp32, as in stages/rl.
CPU_FLOPS = 2e10
# FLOP/s of a GPU of a vLLM server, a tenth of an H100's peak in bf16: assumed, as no GPU has run an evaluation yet.
GPU_FLOPS = 1e14
# Bytes of weights that a server reads in a second from the shared file system.
READ_BYTES = 1e9
# Seconds in which a stage's process starts, and a vLLM server without its weights.
START_SECONDS, SERVER_SECONDS = 10.0, 120.0
# Seconds of work of one shard.
SHARD_SECONDS = 3600.0
# Files of an artifact, at most: tables, scores and the manifest. Shards leave none in it.
FILES = 8
# Memory of PyTorch and transformers, and of a batch of a small model.
BASE_BYTES = vllm_server.PYTHON_BYTES
# Assumed length of a question, and of a held-out document.
QUESTION_TOKENS, DOCUMENT_TOKENS = 100, 1000
ASSUMED = (
    f"evaluation by vLLM at {GPU_FLOPS / 1e12:.0f} TFLOP/s a GPU, reading weights at {READ_BYTES / 1e9:.0f} GB/s; "
    "not measured"
)

M = TypeVar("M")
R = TypeVar("R")


@dataclass(frozen=True)
class Piece(Generic[M]):
    """A piece of an evaluation.

    Attributes:
        name: Name of its file in the work folder.
        make: Function of the model that returns the result, as plain JSON.
        size: Number of its items, for the progress.
    """

    name: str
    make: Callable[[M], Any]
    size: int = 1


def compute(
    pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M], report: Report | None = None, unit: str = "items"
) -> list[Any]:
    """Returns the results of the pieces, in order. Those that `work` keeps are not computed again.

    Args:
        pieces: The pieces.
        work: Work folder of the stage, where each result is kept.
        load: Opens the model, for the first piece that is missing. It is closed at the end if it has `close`.
        report: Gets the progress.
        unit: What the sizes of pieces count, for the progress.
    """
    opened: list[M] = []

    # Opened once, and only if a piece is missing: a stage that resumes after its last piece loads no weights.
    @cache
    def model() -> M:
        opened.append(load())
        return opened[0]

    def make(piece: Piece[M]) -> Any:
        return piece.make(model())

    results = []
    total, done = sum(piece.size for piece in pieces), 0
    try:
        for piece in pieces:
            results.append(once(work / f"{piece.name}.json", partial(make, piece)))
            done += piece.size
            if report is not None:
                report.progress(done, total, unit)
    finally:
        # A server must not outlive the stage, whatever ended it.
        for each in opened:
            if close := getattr(each, "close", None):
                close()
    return results


def compute_shard(pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M], shard: int, shards: int) -> None:
    """Leaves the results of one shard's pieces in `work`: every `shards`-th."""
    # Neighbors have similar lengths, so every n-th piece gives shards that take about as long as each other.
    compute(pieces[shard::shards], work, load)


def batched_pieces(name: str, rows: Sequence[R], size: int, make: Callable[[M, Sequence[R]], Any]) -> list[Piece[M]]:
    """Returns a piece for each batch of rows.

    Args:
        name: Beginning of the names of the pieces, before the number of the batch.
        rows: All rows.
        size: Rows of a batch.
        make: Function of the model and a batch that returns the result.
    """

    def piece(number: int, batch: Sequence[R]) -> Piece[M]:
        return Piece(f"{name}-{number:05d}", lambda model: make(model, batch), len(batch))

    starts = range(0, len(rows), size)
    return [piece(number, rows[start : start + size]) for number, start in enumerate(starts)]


def count(items: int, size: int) -> int:
    """Returns the number of pieces of `size` items."""
    return -(-items // size)


class Expected(Config):
    """The model and the tokens that are expected, for `atom plan` alone."""

    parameters: Annotated[int, Range(1, 1e21)]
    """parameters of the model"""
    active: Annotated[int, Range(1, 1e21)]
    """parameters that a token uses"""
    tokens: Annotated[int, Range(0, 1e15)]
    """tokens that are read or drawn"""
    pieces: Annotated[int, Range(1, 1e9)] = 1
    """pieces of work that tasks may share"""
    weight_bytes: Annotated[int, Range(0, 1e22)] = 0
    """bytes of the exported weights"""
    served_bytes: Annotated[int, Range(0, 1e22)] = 0
    """memory of a vLLM server's process beside its weights, on each GPU if it has some"""


class EngineConfig(Config):
    """Settings of every stage that runs an exported model."""

    engine: Engine = engine_field()
    """what computes the results"""
    expected: Expected | None = operational(None)
    """the model and tokens, for `atom plan` alone; null: unknown"""


def expected(
    model: ModelConfig, padded_vocab_size: int, tokens: int, pieces: int, dtype: str, engine: Engine
) -> Expected:
    """Returns what `atom plan` expects of a measurement.

    Args:
        model: The model's settings.
        padded_vocab_size: Rows of its embedding.
        tokens: Tokens that are read or drawn.
        pieces: Pieces of the work.
        dtype: Data type of the exported weights.
        engine: What computes.
    """
    parameters, width = model.parameters(padded_vocab_size), 4 if dtype == "float32" else 2
    served = 0
    if engine.kind == "vllm":
        served = vllm_server.memory_beside_weights(model, padded_vocab_size, width, engine.gpus)
    return Expected(
        parameters=parameters["total"],
        active=parameters["active"],
        tokens=tokens,
        pieces=pieces,
        weight_bytes=width * parameters["total"],
        served_bytes=served,
    )


def shards(expected: Expected | None, models: int, engine: Engine) -> int:
    """Returns the number of shards of about an hour each, but no more than there are pieces.

    The pieces are the same for any number of shards, so this estimate has no part in the bytes.
    """
    if expected is None:
        return 1
    return max(1, min(expected.pieces, math.ceil(models * _flops(expected) / _rate(engine) / SHARD_SECONDS)))


def _flops(expected: Expected) -> float:
    return 2.0 * expected.active * expected.tokens


def _rate(engine: Engine) -> float:
    return engine.gpus * GPU_FLOPS if engine.gpus else CPU_FLOPS


def estimate(expected: Expected | None, models: int, engine: Engine) -> Estimate:
    """Returns the resources of a stage that runs some models, one after the other.

    In the stage's process, weights are read from a mapped file and converted to fp32 a tensor at a time; a vLLM server
    holds them as they were exported. `memory_bytes` is that of one GPU if the engine has some.
    """
    if expected is None:
        return Estimate(memory_bytes=BASE_BYTES, disk_bytes=0)
    number = shards(expected, models, engine)
    flops = _flops(expected) * models
    starts = number + (1 if number > 1 else 0)  # after several shards, one more process joins their results
    base = Estimate(
        cpu_seconds=START_SECONDS * starts + flops / CPU_FLOPS,
        serial_seconds=START_SECONDS if starts > 1 else None,
        flops=flops,
        tokens=expected.tokens * models,
        memory_bytes=BASE_BYTES + 4 * expected.parameters,
        disk_bytes=8 * expected.tokens,
        files=FILES,
    )
    if engine.kind == "in-process":
        return base

    loads = models * number * (SERVER_SECONDS + expected.weight_bytes / READ_BYTES)
    if not engine.gpus:
        memory = vllm_server.memory_on_cores(expected.weight_bytes, expected.served_bytes)
        return replace(base, cpu_seconds=(base.cpu_seconds or 0) + loads, memory_bytes=memory)
    return replace(
        base,
        gpu_seconds=engine.gpus * (START_SECONDS * starts + loads + flops / _rate(engine)),
        assumed=ASSUMED,
        host_bytes=vllm_server.host_memory(engine.gpus),
        memory_bytes=expected.weight_bytes // engine.gpus + expected.served_bytes,
    )


def of_engine(models: int = 1) -> dict[str, Any]:
    """Returns the functions of a Stage whose config is an `EngineConfig`, for a stage that runs so many models."""
    return {
        "estimate": lambda config: estimate(config.expected, models, config.engine),
        "shards": lambda config: shards(config.expected, models, config.engine),
        "gpus": lambda config: config.engine.gpus,
        "environment": lambda config: config.engine.environment,
        "libraries": TRANSFORMERS,
        "promise": lambda config: config.engine.promise,
        "lack": lambda config: config.engine.lack,
    }
