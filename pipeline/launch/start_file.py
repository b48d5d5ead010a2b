"""`logs/<run>/<node>/start.json`: the settings, inputs and nodes of the latest start of a stage, for MLflow.

Nothing depends on this file: an error while it is written is printed, and the stage continues.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.events import Number
from pipeline.core.json_files import Damaged
from pipeline.core.stage import identity
from pipeline.core.store import Artifact
from pipeline.launch.attempt import Attempt

NAME = "start.json"


class Input(TypedDict):
    key: str
    digest: str


class StartSettings(TypedDict):
    """start: the number of the lease, 1 for the first start at the key. config: what is in the key; operation: the
    rest of it. layout: of the ranks of a training phase, in words. flops_per_token: of the model, in training.
    peak_flops: of one GPU in the precision of the phase. job, nodes: of Slurm; else None, and the host."""

    start: int
    time: Number
    config: dict[str, Any]
    operation: dict[str, Any]
    inputs: dict[str, Input]
    ranks: int
    gpus: int
    layout: str | None
    flops_per_token: Number | None
    peak_flops: float | None
    job: str | None
    nodes: str


START_SETTINGS: TypeAdapter[StartSettings] = TypeAdapter(StartSettings)


def write(attempt: Attempt, number: int) -> None:
    """Writes the file of this start. number: of its lease."""
    try:
        folder = attempt.store.logs / attempt.task.run / attempt.task.node
        atomic_files.write(folder / NAME, json.dumps(_start(attempt, number)))
    except Exception as error:  # whatever it is, it must not end the stage
        print(f"{attempt.task.node}: {NAME} was not written: {error}", file=sys.stderr, flush=True)


def _start(attempt: Attempt, number: int) -> StartSettings:
    task, training = attempt.task, attempt.stage.estimate(attempt.config).training
    peak = None
    if training is not None and task.peaks:
        from pipeline.core.stage import family

        peak = task.peaks.get(family(training.precision))
    return {
        "start": number,
        "time": attempt.started,
        "config": identity(attempt.config),
        "operation": attempt.operations[-1],
        "inputs": {role: _input(artifact) for role, artifact in sorted(attempt.materials.items())},
        "ranks": task.ranks,
        "gpus": task.gpus,
        "layout": training.layout if training else None,
        "flops_per_token": training.gflop_per_token * 1e9 if training else None,
        "peak_flops": peak,
        "job": os.environ.get("SLURM_JOB_ID"),
        "nodes": os.environ.get("SLURM_JOB_NODELIST") or socket.gethostname(),
    }


def _input(artifact: Artifact) -> Input:
    return {"key": artifact.key, "digest": artifact.digest}


def read(folder: Path) -> StartSettings | None:
    """The latest start of a stage with this folder of logs; None if there was none, or if the file is damaged, which is
    reported."""
    try:
        start: StartSettings = json_files.read(folder / NAME, START_SETTINGS)
    except FileNotFoundError:  # no start yet, or an older run
        return None
    except Damaged as error:
        json_files.report(error, "how the stage was started is not known")
        return None
    return start
