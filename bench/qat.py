"""Weights in MXFP4: what a last phase that rounds them in its forward pass gains over rounding them afterwards.

    .venv/bin/python bench/qat.py            # three seeds, about a minute of one core
    .venv/bin/python bench/qat.py --quick    # to see that it works

A proxy of atom-tiny's model is trained on the bytes of Python's standard library in fp32. From its weights a last phase
trains twice, with a fresh optimizer and the same rows: as before, and with `weight_format: mxfp4`. The losses are of
held-out text, in nats a byte: without the format unrounded and rounded afterwards, and with it, as it is published.
The last line is one JSON object. `ratio` is the loss of rounding afterwards by that of training in the format, the mean
over seeds; low and high are the least and the most of a seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_policies import load

from pipeline.graph import recipe as recipes
from stages.mcore.model import named_tensors
from stages.mcore.quantize import FORMATTED, to_weight_format
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.engine import Engine
from stages.train.precision_simulation.proxy_model import VOCABULARY, build_proxy
from stages.train.precision_simulation.runner import byte_windows, read_library
from stages.train.schedule import learning_rate

WIDTH, ROWS, LENGTH, HELDOUT = 64, 8, 128, 0.05
"""The least width of a linear layer, rows of a step, bytes of a row, and share of the text that is held out."""
RATE = 2e-3


def config(model: Any, steps: int, rate: float, weight_format: str | None, seed: int) -> TrainConfig:
    optimizer = {"lr": rate, "final_lr": rate / 10, "warmup_steps": steps // 8}
    phase = {
        "mix": {"stdlib": 1.0}, "sequence_length": LENGTH, "steps": steps, "optimizer": optimizer,
        "batch": {"global_tokens": ROWS * LENGTH, "micro_tokens": ROWS * LENGTH}, "weight_format": weight_format,
        "validation": {"every": steps, "rows": 1}, "release_checkpoint_interval": steps,
    }  # fmt: skip
    return TrainConfig.model_validate({"model": model, "phase": phase, "padded_vocab_size": VOCABULARY, "seed": seed})


def train(
    settings: TrainConfig, text: bytes, label: str, begin: Mapping[str, torch.Tensor] | None,
    measure: Callable[[Engine], Sequence[float]],
) -> tuple[dict[str, torch.Tensor], Sequence[float]]:  # fmt: skip
    """Trains a phase on windows that the label and the seed choose. Returns its tensors and what `measure` says."""
    with parallel.session(settings.seed) as ranks:
        engine = Engine(settings, ranks, VOCABULARY)
        if begin is None:
            engine.initialize()
        else:
            load(engine, begin)
        for step in range(1, settings.phase.steps + 1):
            batch = byte_windows(text, ROWS, LENGTH, f"{label} {settings.seed} {step}")
            engine.step(batch, learning_rate(step, settings.phase.steps, settings.phase.optimizer), lambda *_: None)
        tensors = {name: tensor.data.clone() for name, tensor in named_tensors(engine.chunks)}
        return tensors | {name: buffer.clone() for name, buffer in engine.buffers.items()}, measure(engine)


def losses(model: Any, text: bytes, steps: tuple[int, int], rows: int, seed: int) -> dict[str, float]:
    end = round(len(text) * (1 - HELDOUT))
    heldout = byte_windows(text[end:], rows, LENGTH, "held out")

    def both(engine: Engine) -> Sequence[float]:
        """As the phase computes, and with weights rounded now."""
        names = [name for name, _ in named_tensors(engine.chunks)]
        weights = engine.local_weights()
        rounded = [to_weight_format(w) if FORMATTED.fullmatch(n) else w for n, w in zip(names, weights, strict=False)]
        with engine.computing_with([*rounded, *weights[len(names) :]]):
            after = engine.evaluate(heldout)
        return engine.evaluate(heldout), after

    first = config(model, steps[0], RATE, None, seed)
    base, _ = train(first, text[:end], "base", None, lambda engine: ())
    plain, last = (config(model, steps[1], RATE / 4, kind, seed) for kind in (None, "mxfp4"))
    _, (unrounded, afterwards) = train(plain, text[:end], "last", base, both)
    _, (trained, again) = train(last, text[:end], "last", base, both)
    assert trained == again, "the phase computes with numbers of the format, which a second rounding leaves alone"
    return {"unrounded": unrounded, "rounded afterwards": afterwards, "trained in MXFP4": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    seeds, steps, rows = (2, (16, 8), 16) if quick else (3, (96, 48), 64)
    model = build_proxy(recipes.load("atom-tiny").config.model, WIDTH)
    text, _ = read_library()
    results = [losses(model, text, steps, rows, seed) for seed in range(seeds)]
    print(f"{model.describe()}; {steps[0]} steps, then {steps[1]} of {ROWS * LENGTH} bytes; {seeds} seeds")
    print(f"{'held-out loss, nats a byte':28}{'mean':>10}{'least':>10}{'most':>10}{'excess':>10}{'± s.e.':>10}")
    for name in results[0]:
        values = [row[name] for row in results]
        excess = [row[name] / row["unrounded"] - 1 for row in results]
        error = statistics.stdev(excess) / len(excess) ** 0.5
        print(
            f"{name:28}{statistics.fmean(values):10.4f}{min(values):10.4f}{max(values):10.4f}"
            f"{statistics.fmean(excess):10.2%}{error:10.2%}"
        )
    ratios = [row["rounded afterwards"] / row["trained in MXFP4"] for row in results]
    print(json.dumps({
        "name": "qat", "ratio": round(statistics.fmean(ratios), 5), "low": round(min(ratios), 5),
        "high": round(max(ratios), 5), "target": 1.0, "unit": "loss rounded afterwards / loss trained in MXFP4",
        "machine": platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
