"""FP8 and FP4 simulation on any machine: trains a recipe's model with and without linear layers that round.

    atom simulate-precision atom-tiny

Each run, one precision from one seed, is a file; the same command continues from the existing files. The deviation of
a precision for one seed is the ratio of its mean loss over the last quarter of steps to the baseline's for the same
seed (same initial weights, same rows), minus 1. Over seeds this has a mean with a standard error, and the verdict
compares the magnitude of the mean with the bound:

    holds         magnitude + 2 standard errors < bound
    fails         magnitude - 2 standard errors > bound, or a loss is not a number
    inconclusive  anything between

With three seeds, two standard errors are a one-sided confidence of 91 % (Student's t), with five 94 %. DeepSeek-V3
reports a relative loss error of FP8 below 0.25 % (arXiv:2412.19437, section 3.3), which is the default bound.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.source_code import code_digests
from pipeline.core.store import canonical, once, sha256_bytes
from pipeline.graph.recipe import Recipe
from stages.data.acquire.readers.python_stdlib import library_files
from stages.mcore.fake_quantization import FP8, RECIPES, attach
from stages.mcore.gpu_environment import missing
from stages.mcore.optimizer import OptimizerSettings
from stages.train import data, parallel
from stages.train.config import BatchSizes, PhaseConfig, TrainConfig, Validation
from stages.train.engine import Engine

BASELINE = "bf16"
"""The precision that the others are compared with."""
VOCABULARY = 256
"""Tokens of the training text, which is the sources of the running interpreter's standard library, as bytes."""
ROW_TOKENS, STEP_TOKENS = 128, 2048
"""Tokens of a row, at most, as attention's own products are not rounded; and of a step."""
MOST_PARAMETERS = 50_000_000
"""A larger model trains for hours on a core."""
ERRORS = 2
"""Standard errors on each side of a mean."""


def simulate(
    recipe: Recipe,
    home: Path,
    note: Callable[[str], None],
    precisions: Sequence[str] = (),
    steps: int = 64,
    seeds: int = 3,
    bound: float = 0.0025,
) -> tuple[dict[str, Any], Path]:
    """Trains the missing runs and writes report.json. Returns the report and its path.

    Args:
        recipe: The recipe.
        home: $ATOM_HOME.
        note: Gets a line for each run.
        precisions: The simulated precisions; none: those of FP8.
        steps: Optimizer steps of a run.
        seeds: The number of seeds, from 0.
        bound: The largest relative deviation of the loss.

    Raises:
        AtomError: A setting is invalid, the model is too large, or the baseline itself diverges.
    """
    for name in precisions:
        if name not in RECIPES:
            raise AtomError(f"--precision {name} is not known; choose of {', '.join(RECIPES)}")
    chosen = [name for name in RECIPES if name in (precisions or FP8)]
    text = b"".join(path.read_bytes() for _, path in library_files())
    config = _config(recipe, steps)
    settings = {
        "recipe": recipe.config.name,
        "config": config.model_dump(mode="json"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "text": hashlib.sha256(text).hexdigest(),
        "packages": {name: metadata.version(name) for name in ("megatron-core", "torch")},
        "code": sha256_bytes(canonical(code_digests("stages.train.precision_simulation"))),
    }
    folder = home / "precision-simulations" / f"{recipe.config.name}-{sha256_bytes(canonical(settings))[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, int], list[float]] = {}
    for seed in range(seeds):
        for precision in (BASELINE, *chosen):
            path = folder / f"{precision}-seed{seed}.json"
            losses = once(path, partial(_train, config.model_copy(update={"seed": seed}), precision, text))
            if len(losses) < steps and precision == BASELINE:
                raise AtomError(
                    f"{recipe.title} in {BASELINE}: from seed {seed} the loss was not a number at step "
                    f"{len(losses) + 1}; lower pretrain.optimizer.lr"
                )
            note(f"{precision}, seed {seed}: {len(losses)} steps, loss {losses[-1] if losses else math.nan:.4f}")
            runs[precision, seed] = losses
    report = compose(settings, chosen, seeds, bound, runs)
    atomic_files.write(folder / "report.json", json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return report, folder / "report.json"


def _config(recipe: Recipe, steps: int) -> TrainConfig:
    """The engine's config: one micro-batch a step of the recipe's model on bytes, computed in bf16.

    The peak learning rate is half of the recipe's, after a third of the steps, then a cosine to a tenth: the first
    steps at the full rate are chaotic, and then even bf16 and fp32 end further apart than the deviation to measure
    (docs/lab-log.md).
    """
    sections: Any = recipe.config  # stages.recipe, whose class this is, imports this package
    if (phase := sections.pretrain) is None:
        raise AtomError(f"{recipe.title} has no pretrain section, whose settings are simulated; add it")
    model = sections.model
    if (size := model.parameters(VOCABULARY)["total"]) > MOST_PARAMETERS:
        raise AtomError(
            f"{recipe.title} has a model of {size / 1e6:.0f} million parameters, and a simulation trains at most "
            f"{MOST_PARAMETERS / 1e6:.0f} million; name a recipe of a smaller model of its architecture"
        )
    peak = phase.optimizer.lr / 2
    schedule = {"schedule": "cosine", "decay_steps": None, "warmup_steps": steps // 3}
    optimizer: OptimizerSettings = phase.optimizer.model_copy(update={"lr": peak, "final_lr": peak / 10, **schedule})
    length = min(phase.sequence_length, ROW_TOKENS)
    tokens = STEP_TOKENS // length * length
    settings = PhaseConfig(
        mix={"stdlib": 1.0},
        sequence_length=length,
        batch=BatchSizes(global_tokens=tokens, micro_tokens=tokens),
        steps=steps,
        optimizer=optimizer,
        validation=Validation(every=steps, rows=1),
        release_checkpoint_interval=steps,
        precision="bf16",
    )
    return TrainConfig(model=model, phase=settings, padded_vocab_size=VOCABULARY, seed=0)


def _train(config: TrainConfig, precision: str, text: bytes) -> list[float]:
    """Returns the losses by step. Ends early at a loss that is not finite."""
    phase, losses = config.phase, []
    recipe = RECIPES.get(precision)
    os.environ.update(missing())  # before a GPU starts
    with parallel.session(config.seed) as ranks:
        engine = Engine(config, ranks, VOCABULARY)
        engine.initialize()
        if recipe is not None:
            attach(engine.chunks, recipe, config.seed, recipe.layers_in_bf16(config.model.layers))
        for step in range(1, phase.steps + 1):
            batch = _windows(text, phase, f"rehearsal {config.seed} {step}")
            figures = engine.step(batch, phase.optimizer.learning_rate(step, phase.steps), _not_finite)
            if figures.refused:
                break
            losses.append(figures.loss)
    return losses


def _not_finite(loss: float, norm: float | None) -> str | None:
    return None if math.isfinite(loss) else "the loss is not a number"


def _windows(text: bytes, phase: PhaseConfig, label: str) -> data.RankBatch:
    """The batch of a step: windows of the text that start at positions drawn from the label."""
    rng, length = random.Random(label), phase.sequence_length
    starts = [rng.randrange(len(text) - length) for _ in range(phase.batch.global_tokens // length)]
    windows = np.stack([np.frombuffer(text, np.uint8, length + 1, start) for start in starts]).astype(np.int64)
    ids, labels = torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
    batch = data.Batch(ids, labels, torch.ones(ids.shape), torch.zeros(ids.shape, dtype=torch.bool))
    return data.RankBatch([batch], length, ids.numel())


def compose(
    settings: Mapping[str, Any],
    precisions: Sequence[str],
    seeds: int,
    bound: float,
    runs: Mapping[tuple[str, int], Sequence[float]],
) -> dict[str, Any]:
    """Returns the report as JSON, without clocks and paths, so that equal runs have equal bytes.

    `runs` has the losses by precision and seed; a run with fewer of them than the baseline's ended with no number.
    """
    steps = len(runs[BASELINE, 0])
    window = steps // 4
    base = [statistics.fmean(runs[BASELINE, seed][-window:]) for seed in range(seeds)]
    entries = []
    for name in precisions:
        deviations = [
            statistics.fmean(losses[-window:]) / base[seed] - 1 if len(losses) == steps else None
            for seed, losses in enumerate(runs[name, seed] for seed in range(seeds))
        ]
        finite = [deviation for deviation in deviations if deviation is not None]
        entry: dict[str, Any] = {"precision": name, "verdict": "fails", "by_seed": deviations}
        if len(finite) == seeds:
            error = statistics.stdev(finite) / seeds**0.5
            entry |= {"mean": statistics.fmean(finite), "standard_error": error}
            entry["verdict"] = verdict_of(entry["mean"], error, bound)
        entries.append(entry)
    verdicts = {entry["verdict"] for entry in entries}
    return {
        "settings": dict(settings),
        "bound": bound,
        "window_steps": window,
        "baseline": {"precision": BASELINE, "loss": base},
        # The worst verdict of a precision is that of the report.
        "verdict": next(verdict for verdict in ("fails", "inconclusive", "holds") if verdict in verdicts),
        "precisions": entries,
    }


def verdict_of(mean: float, error: float, bound: float) -> str:
    """Returns holds, fails or inconclusive for a mean with its standard error, as defined above."""
    if abs(mean) + ERRORS * error < bound:
        return "holds"
    return "fails" if abs(mean) - ERRORS * error > bound else "inconclusive"


def table(report: Mapping[str, Any]) -> str:
    """Returns the report as a table in Markdown."""
    lines = [f"| precision | loss against {BASELINE} | least | most | verdict |", "|---|---|---|---|---|"]
    for row in report["precisions"]:
        cells = ["not a number"] * 3
        if "mean" in row:
            extremes = (f"{least:+.3%}" for least in (min(row["by_seed"]), max(row["by_seed"])))
            cells = [f"{row['mean']:+.3%} ± {row['standard_error']:.3%}", *extremes]
        lines.append(f"| {' | '.join([row['precision'], *cells, row['verdict']])} |")
    return "\n".join(lines)
