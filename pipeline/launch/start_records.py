"""The records of the starts of a stage.

    work/<key>/starts.json               of every start of a stage that trains: time, commit, dirty, prediction
    work/<key>/state/starts/0002.json    what the stage adds: restored step, device, comparison with the log
    logs/<run>/<node>/start.json         of the latest start: settings, inputs and nodes, for MLflow

The first two are for the statement of the stage, and name a start by the number of its lease. A killed start writes no
statement, but stays in the next one's. Nothing depends on the third one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict

import pipeline
from pipeline.core import atomic_files, environment, json_files, provenance
from pipeline.core.events import Number
from pipeline.core.json_files import Damaged
from pipeline.core.provenance import Start
from pipeline.core.store import Store

RECORDS: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[dict[str, Any]])
RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
SETTINGS = "start.json"
PREDICTION = "prediction"
"""The name of a prediction's key; the rest is that of the predicted stage's key."""


def prediction_key(key: str) -> str:
    """The key of the prediction of a stage's product."""
    return f"{PREDICTION}-{key.rpartition('-')[2]}"


class StartRecords:
    """folder: of the work at a key. number: of this start's lease."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / "starts.json"

    def add(self, store: Store, key: str, started: float) -> None:
        """Adds this start. Its prediction is the digest of the one that is sealed at this moment, None without one."""
        commit, dirty = environment.git_commit(Path(pipeline.__path__[0]).parent)
        predicted = prediction_key(key)
        record: Start = {
            "start": self.number,
            "startedOn": provenance.clock(started),
            "commit": commit,
            "dirty": dirty,
            "prediction": store.manifest(predicted).digest if store.sealed(predicted) else None,
        }
        atomic_files.write(self.path, json.dumps([*self._read(), record]))

    def read(self) -> list[Start]:
        """All starts at the key, each with what its stage added."""
        return [cast(Start, {**record, **self._of_stage(record)}) for record in self._read()]

    def _read(self) -> list[Start]:
        return _read(self.path, RECORDS) or []

    def _of_stage(self, record: Start) -> dict[str, Any]:
        return _read(self.folder / "state/starts" / f"{record.get('start', 0):04d}.json", RECORD) or {}


def _read(path: Path, kind: TypeAdapter[Any]) -> Any:
    """The content of a file; None if there is none, or, with a report, if it is damaged."""
    try:
        return json_files.read(path, kind)
    except FileNotFoundError:
        return None
    except Damaged as error:
        json_files.report(error, "what it says of earlier starts is not stated")
        return None


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


def read_settings(folder: Path) -> StartSettings | None:
    """The latest start of a stage with this folder of logs; None if there was none, or if the file is damaged, which is
    reported."""
    try:
        start: StartSettings = json_files.read(folder / SETTINGS, START_SETTINGS)
    except FileNotFoundError:  # no start yet, or an older run
        return None
    except Damaged as error:
        json_files.report(error, "how the stage was started is not known")
        return None
    return start
