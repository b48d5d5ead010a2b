"""FP8 and FP4 simulation on any machine: trains a small proxy of a recipe's model with and without it, run by run.

atom simulate-precision atom-tiny

Each run, one precision from one seed, is a process of its own and writes a file; the same command continues from the
existing files. `stages.train.precision_simulation.report` computes the verdict.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.progress import Display
from pipeline.core.source_code import code_digests
from pipeline.core.store import canonical, sha256_bytes
from pipeline.graph.recipe import Recipe
from stages.mcore.gpu_environment import missing
from stages.mcore.optimizer import OptimizerSettings
from stages.mcore.quantize import FP8, RECIPES
from stages.models.base import ModelConfig
from stages.train.config import PhaseConfig
from stages.train.precision_simulation.report import Runs, compose, markdown
from stages.train.precision_simulation.runner import BASELINE, VOCABULARY, Settings, describe, read_library

UNIT = 32
"""Widths are multiples of this: the requirement of Transformer Engine for MXFP8, above those of the other recipes."""
LAYERS = 2
"""At most."""
TOLERANCE = 0.05
"""Largest relative deviation of a ratio."""
CONTEXT = 128
"""The longest row: attention's own products are not rounded."""
MAX_WIDTH = 4096
"""A wider proxy is not small."""
SPARE = 3
"""Mean tokens of an expert over the minimum that it must see: routers are uneven, mostly at the beginning."""
MIN_TOKENS = 1024
"""Minimum tokens of a step, so that noise does not dominate its loss."""
Ratio = tuple[str, float, float]
"""(name, in the recipe's model, in the proxy)"""


def simulate(
    recipe: Recipe,
    home: Path,
    display: Display,
    precisions: Sequence[str] = (),
    steps: int = 64,
    seeds: int = 3,
    bound: float = 0.0025,
    layers: int | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Trains the missing runs and writes report.json and report.md. Returns the report and its folder.

    home: $ATOM_HOME, the parent of the folder unless `out` names one. Raises AtomError, in one sentence, for an invalid
    setting, for a folder with other content, and for a failed run.
    """
    for name in precisions:
        if name not in RECIPES:
            raise AtomError(f"--precision {name} is not known; choose of {', '.join(RECIPES)}")
    chosen = [name for name in RECIPES if name in (precisions or FP8)]
    smallest = max(RECIPES[name].smallest_dimension for name in chosen)
    sections: Any = recipe.config  # stages.recipe, whose class this is, imports this package
    if (phase := sections.pretrain) is None:
        raise AtomError(f"{recipe.title} has no pretrain section, whose settings are simulated; add it")
    model = sections.model
    proxy = build_proxy(model, smallest)
    if layers is not None:
        min_layers = proxy.routing.layers[0] + 1 if proxy.routing else 1
        if layers < min_layers:
            raise AtomError(f"--layers {layers} is no depth of a small proxy; use at least {min_layers}")
        proxy = type(proxy).model_validate({**proxy.model_dump(), "layers": layers})
    length = min(phase.sequence_length, CONTEXT)
    settings = Settings(
        recipe=recipe.config.name,
        model=proxy,
        sequence_length=length,
        rows=step_tokens(proxy, smallest, length) // length,
        steps=steps,
        optimizer=_optimizer(phase, steps, model.hidden_size / proxy.hidden_size),
        data=describe(*read_library()),
        packages={name: metadata.version(name) for name in ("megatron-core", "torch")},
        code=sha256_bytes(canonical(code_digests("stages.train.precision_simulation.runner"))),
    )
    folder = _folder(settings, home, out)
    requested = [(precision, seed) for seed in range(seeds) for precision in (BASELINE, *chosen)]
    run_all(folder, requested, display)
    runs: Runs = {run: json.loads(_file(folder, *run).read_text()) for run in requested}
    report = compose(settings, ratios(model, proxy), chosen, seeds, bound, runs)
    atomic_files.write(folder / "report.json", json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    atomic_files.write(folder / "report.md", markdown(report))
    return report, folder


def _optimizer(phase: PhaseConfig, steps: int, narrowing: float) -> OptimizerSettings:
    """Returns the recipe's optimizer, with a learning rate for the proxy.

    The best rate of a matrix is inverse to its width (Yang et al., 2022, arXiv:2203.03466), hence the recipe's x hidden
    size / hidden size of the proxy. The peak is half of that, after a third of the steps, then a cosine to a tenth: the
    first steps at the full rate are chaotic, and then even bf16 and fp32 end further apart than the deviation to
    measure (docs/lab-log.md).
    """
    peak = min(1.0, phase.optimizer.lr * narrowing / 2)  # 1: the maximum of an optimizer
    schedule = {"schedule": "cosine", "decay_steps": None, "warmup_steps": steps // 3}
    return phase.optimizer.model_copy(update={"lr": peak, "final_lr": peak / 10, **schedule})


def _folder(settings: Settings, home: Path, out: Path | None) -> Path:
    """Returns the folder of these settings, created if missing. Raises AtomError if `out` contains anything else."""
    body = settings.model_dump(mode="json")
    folder = out or home / "precision-simulations" / f"{settings.recipe}-{sha256_bytes(canonical(body))[:12]}"
    file = folder / "settings.json"
    if file.exists():
        saved = json.loads(file.read_text())
        changed = sorted(name for name in body if saved.get(name) != body[name])
        if changed:
            raise AtomError(f"{folder} holds a simulation of another {', '.join(changed)}; name another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise AtomError(f"{folder} is not empty and no simulation's; name another folder")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    atomic_files.write(file, json.dumps(body, indent=1, sort_keys=True) + "\n")
    return folder


def _file(folder: Path, precision: str, seed: int) -> Path:
    return folder / "runs" / f"{precision}-seed{seed}.json"


def run_all(folder: Path, requested: Sequence[tuple[str, int]], display: Display) -> None:
    """Trains the runs without a file, one at a time on each core. Raises AtomError if one fails."""
    # Finished runs have a file, so that an interrupted simulation goes on where it stopped.
    waiting = [run for run in requested if not _file(folder, *run).exists()]
    display.started("simulation", f"{folder / 'runs'}/*.log")
    if not waiting:
        display.note("simulation", f"all of {len(requested)} runs are there already")
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                run = waiting.pop(0)
                running[run] = _start(folder, *run)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    display.note("simulation", _outcome(folder, *run))
            done = len(requested) - len(waiting) - len(running)
            display.progress("simulation", time.time(), done, len(requested), "runs", {})
            time.sleep(0.1)
    finally:  # also at Ctrl-C: finished runs are kept
        for process in running.values():
            process.kill()
            process.wait()


def _start(folder: Path, precision: str, seed: int) -> subprocess.Popen[bytes]:
    out = _file(folder, precision, seed)
    # Runs fill the cores, and on one thread sums have one order.
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Each run is a process by itself, also where a launcher has started this one as a rank.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | one_thread | missing()
    module = [sys.executable, "-m", "stages.train.precision_simulation.runner"]
    with open(out.with_suffix(".log"), "w") as log:
        command = [*module, str(folder / "settings.json"), precision, str(seed), str(out)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def _outcome(folder: Path, precision: str, seed: int) -> str:
    """Returns what became of a run that has ended. Raises AtomError if it failed."""
    out = _file(folder, precision, seed)
    if not out.exists():
        log = out.with_suffix(".log")
        message = (log.read_text().strip().splitlines() or ["it was killed"])[-1]
        raise AtomError(f"the run of {precision} from seed {seed} failed ({message}); its log is {log}")
    end = json.loads(out.read_text())
    outcome = f"diverged at step {end['diverged_at']}" if end["diverged_at"] else f"loss {end['losses'][-1]:.4f}"
    return f"{precision}, seed {seed}: {outcome}"


def build_proxy(model: ModelConfig, smallest: int) -> ModelConfig:
    """Returns a small model with the ratios of this one.

    The proxy keeps the ratios of all widths to the hidden size, of query to key heads and of experts to experts per
    token (as far as a small model allows), and the losses of the router. Weights start with `init_std` x sqrt(hidden /
    hidden of the proxy), so that the output of a layer is as large as in the recipe's model.

    Args:
        model: The recipe's model.
        smallest: The minimum of both dimensions of every linear layer.

    Raises:
        RecipeError: There is no such model.
    """
    for width in range(math.ceil(smallest / UNIT) * UNIT, MAX_WIDTH + 1, UNIT):
        proxy = _scaled_model(model, width)
        if proxy is None or min(dimensions(proxy)) < smallest:
            continue
        if all(abs(small / large - 1) <= TOLERANCE for _, large, small in widths(model, proxy)):
            return proxy
    raise RecipeError(f"no proxy of up to {MAX_WIDTH} wide has the proportions of the model; use other widths")


def _scaled_model(model: ModelConfig, hidden: int) -> ModelConfig | None:
    """The proxy of that hidden size; None if its attention cannot be divided into heads."""

    def scaled(size: int) -> int:
        return max(1, round(size * hidden / model.hidden_size / UNIT)) * UNIT

    changes = model.scaled(hidden, scaled)
    if changes is None:
        return None
    changes |= {
        "layers": min(model.layers, LAYERS),
        "context_length": CONTEXT,
        "init_std": min(1.0, model.init_std * (model.hidden_size / hidden) ** 0.5),  # the maximum of a model
        "yarn": None,
    }
    return type(model).model_validate({**model.model_dump(), **changes})


def dimensions(model: ModelConfig) -> list[int]:
    """The input and output width of every kind of linear layer."""
    shapes = {name: shape for name, shape in model.shapes(VOCABULARY).items() if "linear_" in name or "_proj." in name}
    return sorted({size for shape in shapes.values() for size in shape})


def widths(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """Returns every inner width by the hidden size, in both."""
    small = proxy.inner_widths()
    return [
        (f"{name} width / hidden", size / model.hidden_size, small[name] / proxy.hidden_size)
        for name, size in model.inner_widths().items()
    ]


def ratios(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """Returns all ratios that the proxy should share with the model."""
    small = proxy.proportions()
    return [*widths(model, proxy), *((name, value, small[name]) for name, value in model.proportions().items())]


def step_tokens(proxy: ModelConfig, smallest: int, sequence_length: int) -> int:
    """Tokens of a step, in complete rows.

    They are at least SPARE times the number with which an average expert sees `smallest`.
    """
    routing = proxy.routing
    tokens = max(MIN_TOKENS, SPARE * smallest * routing.experts / routing.top_k) if routing else MIN_TOKENS
    return math.ceil(tokens / sequence_length) * sequence_length
