"""One run of a precision simulation: trains the proxy in one precision from one seed, in a process of its own.

    python -m stages.train.precision_simulation.runner SETTINGS.json PRECISION SEED OUT.json

Writes OUT.json only when it is finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from pipeline.core import atomic_files, process
from pipeline.core.stage import Config
from stages.data.acquire.readers.python_stdlib import library_files
from stages.mcore.optimizer import Optimizer
from stages.models.base import PositiveInt
from stages.models.registry import Model
from stages.train.config import BatchSizes, PhaseConfig, TrainConfig, Validation

VOCABULARY = 256
"""Size of the vocabulary of proxies: bytes."""
BASELINE = "bf16"
"""The precision that the others are compared with."""


class Data(Config):
    """The training text of the runs: the sources of the running interpreter's standard library, as bytes."""

    python: str
    """version of Python"""
    files: PositiveInt
    """number of files"""
    bytes: PositiveInt
    """size of the text in bytes"""
    sha256: str
    """SHA-256 digest of the text"""


class Settings(Config):
    """The common settings of all runs. With precision and seed they determine every byte of a run."""

    recipe: str
    """name of the recipe"""
    model: Model
    """architecture of the model"""
    sequence_length: PositiveInt
    """tokens predicted in one row"""
    rows: PositiveInt
    """rows of one step"""
    steps: PositiveInt
    """steps of a run"""
    optimizer: Optimizer
    """optimizer and its learning-rate schedule"""
    data: Data
    """training text"""
    packages: dict[str, str]
    """versions of packages by name"""
    code: str
    """digest of the code"""

    def config(self, seed: NonNegativeInt) -> TrainConfig:
        """The engine's config: one micro-batch a step, computed in bf16."""
        tokens = self.rows * self.sequence_length
        return TrainConfig(
            model=self.model,
            phase=PhaseConfig(
                mix={"stdlib": 1.0},
                sequence_length=self.sequence_length,
                batch=BatchSizes(global_tokens=tokens, micro_tokens=tokens),
                steps=self.steps,
                optimizer=self.optimizer,
                validation=Validation(every=self.steps, rows=1),
                release_checkpoint_interval=self.steps,
                precision="bf16",
            ),
            padded_vocab_size=VOCABULARY,
            seed=seed,
        )


def read_library() -> tuple[bytes, int]:
    """The training text and its number of files."""
    files = library_files()
    return b"".join(path.read_bytes() for _, path in files), len(files)


def describe(text: bytes, files: int) -> Data:
    version = ".".join(map(str, sys.version_info[:3]))
    return Data(python=version, files=files, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())


def train(settings: Settings, precision: str, seed: int) -> dict[str, Any]:
    """Losses by step and the records of the linear layers. Ends early at a loss that is not finite."""
    from stages.mcore.fake_quantization import attach
    from stages.mcore.quantize import RECIPES
    from stages.train import parallel
    from stages.train.engine import Engine

    text, files = read_library()
    # Runs are compared with each other, also with those of an earlier day, so all must read the same text.
    if describe(text, files) != settings.data:
        raise SystemExit("the standard library is not the one that this simulation began with")
    losses: list[float] = []
    norms: list[float] = []
    recipe = RECIPES.get(precision)
    with parallel.session(seed) as ranks:
        engine = Engine(settings.config(seed), ranks, VOCABULARY)
        engine.initialize()
        in_bf16 = recipe.layers_in_bf16(settings.model.layers) if recipe else ()
        record = attach(engine.chunks, recipe, seed, in_bf16) if recipe else {}
        for step in range(1, settings.steps + 1):
            lr = settings.optimizer.learning_rate(step, settings.steps)
            # The label is what the rows are drawn from, so another wording would draw others.
            batch = byte_windows(text, settings.rows, settings.sequence_length, f"rehearsal {seed} {step}")
            figures = engine.step(batch, lr, lambda loss, norm: _not_finite(loss))
            if figures.refused:
                break
            losses.append(figures.loss)
            norms.append(figures.grad_norm)
    return {
        "precision": precision,
        "seed": seed,
        "losses": losses,
        "grad_norms": norms,
        "diverged_at": len(losses) + 1 if len(losses) < settings.steps else None,
        "linears": [{"layer": layer, "linear": name, **linear.json()} for (layer, name), linear in record.items()],
    }


def _not_finite(loss: float) -> str | None:
    return None if math.isfinite(loss) else "the loss is not a number"


def byte_windows(text: bytes, rows: int, length: int, label: str) -> Any:
    """A rank's batch: windows of the text, each of so many bytes, that start at positions drawn from the label."""
    import numpy as np
    import torch

    from stages.train import data

    rng = random.Random(label)
    starts = [rng.randrange(len(text) - length) for _ in range(rows)]
    windows = np.stack([np.frombuffer(text, np.uint8, length + 1, start) for start in starts]).astype(np.int64)
    ids, labels = torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
    batch = data.Batch(ids, labels, torch.ones(ids.shape), torch.zeros(ids.shape, dtype=torch.bool))
    return data.RankBatch([batch], length, ids.numel())


def main(settings: Path, precision: str, seed: int, out: Path) -> None:
    process.collect_rarely()
    result = train(Settings.model_validate_json(settings.read_text()), precision, seed)
    atomic_files.write(out, json.dumps(result, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
