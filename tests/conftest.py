"""Shared fixtures: run one stage as the engine would, on small work, in this process or a fresh one."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipeline.stage import Stage
from pipeline.store import Artifact, write_manifest


class RecordingReport:
    """A Report that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []
        self.done: tuple[int, int] = (0, 0)

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        self.done = (done, total)

    def metric(self, step: int, **values: float) -> None:
        self.points.append((step, values))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def run_stage(tmp_path: Path):
    """run_stage(STAGE, config_dict, {"role": artifact}) -> sealed Artifact, by the stage's own function."""
    count = itertools.count()

    def run(stage: Stage, config: dict[str, Any], inputs: dict[str, Artifact], work: Path | None = None) -> Artifact:
        n = next(count)
        work, out = work or tmp_path / f"work-{n}", tmp_path / f"out-{n}"
        work.mkdir(exist_ok=True)
        out.mkdir()
        stage.run(stage.config.model_validate(config), inputs, work, out, RecordingReport())
        return write_manifest(out, f"{stage.name}-{n}")

    return run
