"""Merging: the average of the weights of a phase's last release checkpoints.

    atom run RECIPE --until merge-pretrain

At a high learning rate the average of the latest weights has a lower loss than the last ones (Sanyal et al., 2023,
arXiv:2306.03241); Nemotron 3 Super merges checkpoints in place of a part of the decay. An average has no optimizer.

Time grows with the bytes of all averaged weights, which are read twice: hashed, then added. Memory is that of the
largest tensor, four times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Steps, Words
from pipeline.core.stage import TORCH, Config, Estimate, Inputs, Report, Stage
from stages.formats.table import write_json
from stages.models.base import PositiveInt
from stages.models.registry import Model
from stages.train.estimate import CheckpointSize

if TYPE_CHECKING:
    import torch

NAME = "merge"
"""The stage, and the first part of the names of its nodes: merge-pretrain, …"""
FILE = "merge.json"
VERSION = 1
PROCESS_BYTES = 500_000_000
"""Memory of an interpreter with PyTorch."""
BYTES_PER_SECOND = 2e8
"""Bytes of checkpoints that one core hashes, reads and adds in a second."""


class MergeConfig(Config):
    """Config of the averaging of a phase's checkpoints."""

    phase: Annotated[str, Words(40, "name of a phase", "[a-z][a-z0-9-]*")]
    """the phase"""
    steps: Annotated[tuple[Steps, ...], Field(min_length=2, max_length=100)]
    """steps of the averaged checkpoints, ascending"""
    model: Model
    """model section, with the rotary embedding of the phase"""
    padded_vocab_size: PositiveInt
    """rows of the embedding matrix"""


def run(config: MergeConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Averages the weights of checkpoints, tensor by tensor.

    inputs["checkpoint"] is the phase. Fills `out` with step-<n>/ of the last step, without an optimizer, and
    merge.json: the phase, the steps, and the SHA-256 of each averaged file.

    Raises AtomError if a checkpoint is missing or damaged, or not of the model.
    """
    from stages.mcore.model import check_tensors
    from stages.train.checkpoint import release_checkpoint

    phase, shapes = inputs["checkpoint"], config.model.shapes(config.padded_vocab_size)
    checkpoints = [release_checkpoint.weights_of(phase, step) for step in config.steps]
    for tensors in checkpoints:
        check_tensors(shapes, tensors.shapes(), phase.key)
    averaged = {path for tensors in checkpoints for path in tensors.files.values()}
    files = {row.path: row.sha256 for row in phase.rows if phase / row.path in averaged}
    merged = {"phase": config.phase, "steps": config.steps, "files": files}
    folder = release_checkpoint.name_of(config.steps[-1])
    last = release_checkpoint.load_state(phase / folder)
    state: dict[str, Any] = {"phase": f"{NAME}-{config.phase}", "optimizer_step": 0, "merge": merged}
    state |= {name: last[name] for name in ("step", "tokens", "tokenizer")}
    read = count(1)

    def read_average(kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        report.progress(next(read), len(shapes), "tensors")
        return average(checkpoints, name)

    release_checkpoint.write(out / folder, shapes, {}, read_average, state)
    write_json(out / FILE, merged)
    report.note(f"the average of the checkpoints of {config.phase} after steps {', '.join(map(str, config.steps))}")


def average(checkpoints: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    """Returns the mean of a tensor over checkpoints, in fp32.

    Sums are made in fp64 in the order of the checkpoints, so every machine computes the same bits.
    """
    total = checkpoints[0][name].double()
    for tensors in checkpoints[1:]:
        total += tensors[name]
    return (total / len(checkpoints)).float()


def estimate(config: MergeConfig) -> Estimate:
    parameters = config.model.parameters(config.padded_vocab_size)
    largest = max(map(math.prod, config.model.shapes(config.padded_vocab_size).values()))
    size = CheckpointSize(weights=4 * parameters["total"], states=0)
    return Estimate(
        cpu_seconds=5 + (len(config.steps) + 1) * size.weights / BYTES_PER_SECOND,
        # The sum and the mean in fp64, and a tensor that is added or written.
        memory_bytes=PROCESS_BYTES + 20 * largest,
        disk_bytes=size.weights,
        files=size.files + 1,
        published=size.published(0, first=True),
        parameters=parameters,
    )


STAGE = Stage(NAME, VERSION, MergeConfig, run, estimate=estimate, libraries=TORCH)
