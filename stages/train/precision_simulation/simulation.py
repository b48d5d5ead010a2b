"""FP8 and FP4 simulation on any machine: trains a small proxy of a recipe's model with and without it, run by run.

atom simulate-precision atom-tiny

Each run, one precision from one seed, is a process of its own and writes a file; the same command continues from the
existing files. `stages.train.precision_simulation.report` computes the verdict.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pipeline.core import atomic_files
from pipeline.core.code_digests import code_digests
from pipeline.core.errors import AtomError, installing
from pipeline.core.progress import Display, duration
from pipeline.core.store import canonical, sha256_bytes
from pipeline.core.text import shown
from pipeline.graph.recipe import Recipe
from stages.mcore.gpu_environment import missing
from stages.mcore.quantize import FP8, RECIPES
from stages.recipe import ReleaseRecipe
from stages.train.config import Optimizer, PhaseConfig
from stages.train.precision_simulation.proxy_model import CONTEXT, build_proxy, dimensions, ratios, step_tokens
from stages.train.precision_simulation.report import MIN_STEPS, Runs, compose
from stages.train.precision_simulation.runner import Baseline, Settings, describe, read_library

BASELINES: tuple[Baseline, ...] = ("bf16", "fp32")

MAX_LAYERS, MAX_STEPS, MAX_SEEDS = 1000, 1_000_000, 1000


def simulate(
    recipe: Recipe, home: Path, display: Display, precisions: Sequence[str] = (), steps: int = 64, seeds: int = 3,
    baseline: str = "bf16", bound: float = 0.0025, hidden: int | None = None, layers: int | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """Trains the missing runs and writes report.json, report.md and plots. Returns the report and its folder.

    home: $ATOM_HOME, the parent of the folder unless `out` names one. Raises AtomError, in one sentence, for an invalid
    setting, for a folder with other content, and for a failed run.
    """
    baseline_kind = _check(precisions, steps, seeds, baseline, bound)
    chosen_recipes = [name for name in RECIPES if name in (precisions or FP8)]
    smallest = max(RECIPES[name].smallest_dimension for name in chosen_recipes)
    sections = recipe.config
    assert isinstance(sections, ReleaseRecipe)
    if (phase := sections.pretrain) is None:
        raise AtomError(f"{recipe.title} has no pretrain section, whose settings are simulated; add it")
    model = sections.model
    proxy = build_proxy(model, smallest, hidden)
    if layers is not None:
        min_layers = proxy.routing.layers[0] + 1 if proxy.routing else 1
        if not min_layers <= layers <= MAX_LAYERS:
            raise AtomError(f"--layers {layers} is no depth of a small proxy; use {min_layers} to {MAX_LAYERS}")
        proxy = type(proxy).model_validate({**proxy.model_dump(), "layers": layers})
    length = min(phase.sequence_length, CONTEXT)
    settings = Settings(
        recipe=recipe.config.name,
        model=proxy,
        sequence_length=length,
        rows=step_tokens(proxy, smallest, length) // length,
        steps=steps,
        optimizer=_optimizer(phase, steps, model.hidden_size / proxy.hidden_size),
        baseline=baseline_kind,
        data=describe(*read_library()),
        packages={name: metadata.version(name) for name in ("megatron-core", "torch")},
        code=sha256_bytes(canonical(code_digests("stages.train.precision_simulation.runner"))),
    )
    folder = _folder(settings, home, out)
    requested = [(precision, seed) for seed in range(seeds) for precision in (baseline, *chosen_recipes)]
    _run_all(folder, requested, steps, display)
    runs: Runs = {(p, s): json.loads(_file(folder, p, s).read_text()) for p, s in requested}
    proportions = [(r.name, r.recipe, r.proxy) for r in ratios(model, proxy)]
    report = compose(settings, proportions, dimensions(proxy), chosen_recipes, seeds, bound, runs)
    _write(folder, report, runs)
    return report, folder


def _check(precisions: Sequence[str], steps: int, seeds: int, baseline: str, bound: float) -> Baseline:
    for name in precisions:
        if name not in RECIPES:
            raise AtomError(f"--precision {name} is not known; choose of {', '.join(RECIPES)}")
    match = next((kind for kind in BASELINES if kind == baseline), None)
    if match is None:
        raise AtomError(f"--baseline {baseline} is not known; choose {' or '.join(BASELINES)}")
    if steps < MIN_STEPS:
        raise AtomError(f"--steps {steps} leaves fewer than two steps in the last quarter; use at least {MIN_STEPS}")
    if steps > MAX_STEPS:
        raise AtomError(f"--steps {shown(steps)} is no short run; use at most {MAX_STEPS}")
    if seeds < 2:
        raise AtomError(f"--seeds {seeds} shows no spread, so nothing could be concluded; use at least 2")
    if seeds > MAX_SEEDS:
        raise AtomError(f"--seeds {shown(seeds)} would take days; use at most {MAX_SEEDS}")
    if not 0 < bound < 1:
        raise AtomError(f"--bound {bound} is no relative deviation of a loss; use something like 0.0025")
    if importlib.util.find_spec("matplotlib") is None:
        raise AtomError(f"the plots need matplotlib, which is not installed; {installing('report')}")
    return match


def _optimizer(phase: PhaseConfig, steps: int, narrowing: float) -> Optimizer:
    """The recipe's AdamW, with a learning rate for the proxy: the best rate of a matrix is inverse to its width (Yang
    et al., 2022, arXiv:2203.03466), hence the recipe's x hidden size / hidden size of the proxy. The peak is half of
    that, after a third of the steps, then a cosine to a tenth: the first steps at the full rate are chaotic, and then
    even bf16 and fp32 end further apart than the deviation to measure (docs/lab-log.md)."""
    recipe_optimizer, peak = (
        phase.optimizer,
        min(1.0, phase.optimizer.lr * narrowing / 2),
    )  # 1: the maximum of an optimizer
    return Optimizer(
        lr=peak,
        final_lr=peak / 10,
        warmup_steps=steps // 3,
        weight_decay=recipe_optimizer.weight_decay,
        beta1=recipe_optimizer.beta1,
        beta2=recipe_optimizer.beta2,
        clip=recipe_optimizer.clip,
    )


def _folder(settings: Settings, home: Path, out: Path | None) -> Path:
    """The folder of these settings, created if missing. Raises AtomError if `out` contains anything else."""
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


def _write(folder: Path, report: dict[str, Any], runs: Runs) -> None:
    from stages.train.precision_simulation import plot
    from stages.train.precision_simulation.report import markdown

    atomic_files.write(folder / "report.json", json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    atomic_files.write(folder / "report.md", markdown(report))
    plot.losses(report, runs, folder / "loss.png")
    plot.rates(report, folder / "rates.png")


def _run_all(folder: Path, requested: Sequence[tuple[str, int]], steps: int, display: Display) -> None:
    """Trains the runs without a file, one run at a time on each core."""
    missing = [(p, s) for p, s in requested if not _file(folder, p, s).exists()]
    display.started("simulation", f"{folder / 'runs'}/*.log")
    if not missing:
        display.note("simulation", f"all of {len(requested)} runs are there already")
        return
    crew = _Crew(folder, steps, len(requested), len(missing), display)
    with ThreadPoolExecutor(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
        try:
            for future in as_completed([pool.submit(crew.run, p, s) for p, s in missing]):
                future.result()
        finally:  # also at Ctrl-C: finished runs are kept
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()


class _Crew:
    """The training processes and their total progress. Threads share it."""

    def __init__(self, folder: Path, steps: int, requested: int, missing: int, display: Display) -> None:
        self.folder, self.steps, self.display = folder, steps, display
        self.total, self.done = steps * requested, steps * (requested - missing)
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped, self.lock = False, threading.Lock()
        self._show()

    def run(self, precision: str, seed: int) -> None:
        """Trains one run to its end. Raises AtomError if it fails."""
        out, started, steps_taken = _file(self.folder, precision, seed), time.monotonic(), 0
        log = out.with_suffix(".log")
        with open(log, "w") as errors:
            process = self._start(precision, seed, out, errors)
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.fullmatch(r"(\d+) (\S+)\n", line):
                    steps_taken = int(match[1])
                    self._show(1, loss=float(match[2]))
        if process.wait():
            message = (log.read_text().strip().splitlines() or ["it was killed"])[-1]
            raise AtomError(f"the run of {precision} from seed {seed} failed ({message}); its log is {log}")
        end = json.loads(out.read_text())
        outcome = f"diverged at step {end['diverged_at']}" if end["diverged_at"] else f"loss {end['losses'][-1]:.4f}"
        self._show(self.steps - steps_taken)
        self.display.note(
            "simulation", f"{precision}, seed {seed}: {outcome}, in {duration(time.monotonic() - started)}"
        )

    def _start(self, precision: str, seed: int, out: Path, errors: TextIO) -> subprocess.Popen[str]:
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | one_thread | missing()
        module = [sys.executable, "-m", "stages.train.precision_simulation.runner"]
        command = [*module, str(self.folder / "settings.json"), precision, str(seed), str(out)]
        with self.lock:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
            self.processes.append(process)
            if self.stopped:
                process.kill()
        return process

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.kill()

    def _show(self, steps: int = 0, **figures: float) -> None:
        with self.lock:
            self.done += steps
            self.display.progress("simulation", time.time(), self.done, self.total, "steps", figures)
