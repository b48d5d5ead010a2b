"""Loads models in plain transformers, in a fresh interpreter, and reads what `stages/export/load_check.py` reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from release.checks.confine import Budget
from stages import export

MODEL, CHAT_TEMPLATE = "model", "chat_template"
LOADING_SECONDS, BYTES_PER_SECOND = 3600, 5_000_000
"""The limit for loading models: so many seconds, and one for so many bytes of their weights."""
NOTHING_FROM_THE_HUB = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
"""Variables with which transformers downloads nothing, and takes no kernel that a config names."""


class LoadProblem(NamedTuple):
    """part: MODEL or CHAT_TEMPLATE."""

    part: str
    text: str


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a model. parameters: counted by transformers, None if it cannot load the model. goldens:
    {messages, rows} of fixed inputs, empty if there are problems."""

    problems: list[LoadProblem]
    parameters: int | None = None
    goldens: dict[str, Any] = field(default_factory=dict)

    def of_part(self, part: str) -> list[str]:
        return [problem.text for problem in self.problems if problem.part == part]


def load_models(folders: list[Path], budget: Budget | None = None) -> list[LoadReport]:
    """A report on each model folder, from one fresh interpreter.

    budget: the limits for untrusted models after the libraries are loaded.
    """
    command = [sys.executable, "-P", str(Path(export.__file__).with_name("load_check.py"))]
    command += [f"--whole={export.WHOLE_BYTES}"]
    command += [] if budget is None else [f"--memory={budget.memory}", f"--seconds={budget.seconds:.0f}"]
    command += [str(folder.resolve()) for folder in folders]
    wall_seconds = LOADING_SECONDS + weight_bytes(folders) // BYTES_PER_SECOND
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=wall_seconds,
            env={**os.environ, **NOTHING_FROM_THE_HUB},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _failed(folders, f"loading did not end within {wall_seconds} s")
    lines = [line.removeprefix("RELOAD ") for line in process.stdout.splitlines() if line.startswith("RELOAD ")]
    if len(lines) == len(folders):
        return [_report(json.loads(line)) for line in lines]
    last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
    if budget is not None and process.returncode < 0:
        memory, seconds = budget.memory >> 20, budget.seconds
        last_line = f"it takes more than {memory} MB of memory or {seconds:.0f} s of processor time"
    return _failed(folders, f"transformers cannot load it: {last_line}")


def weight_bytes(folders: list[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _report(body: dict[str, Any]) -> LoadReport:
    return LoadReport([LoadProblem(*row) for row in body["problems"]], body["parameters"], body["goldens"])


def _failed(folders: list[Path], message: str) -> list[LoadReport]:
    return [LoadReport([LoadProblem(MODEL, message)])] * len(folders)
