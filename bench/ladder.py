"""Runs a ladder of widths, budgets and seeds, seals a forecast of larger runs, makes them, and compares.

    .venv/bin/python bench/ladder.py --home runs/ladder                 # everything, in order
    .venv/bin/python bench/ladder.py --home runs/ladder --until seal    # up to the sealed forecast

The text is that of the source distributions of data_recipes/pypi.lock.yaml, which are fetched first; bench/ladder.yaml
has the sizes. All widths have one rate: the smallest of those whose held-out loss on the smallest budget, in the mean
over widths, is the least or about the least. To all runs of the ladder a law L = E + A/N^alpha + B/D^beta is fitted
(`atom ladder`), one for the held-out loss and one for bits per byte; its bands of 90 % are for one further run, so they
include the noise of seeds. What the laws say of the target is written to forecast.json, which is not written once a run
of the target has begun. Then the target is run and compared, and with its runs a forecast of `next` is sealed in
next.json; a ladder whose target is `next` would have to run it.

Runs are sealed in the home: a run that was stopped goes on. The last line is one JSON object; its ratio is the measured
bits per byte of the target divided by those forecast.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import atomic_files
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.prediction import ladder, sealing

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "loss": "held-out loss, nats a token",
    "bits": "bits per byte of held-out documents, the mean of both sources",
}
# Nats by which two rates may differ and count as equal: half the standard deviation of seeds.
TIE = 0.01
SUMMARY, FORECAST, NEXT = "ladder.json", "forecast.json", "next.json"
STEPS = ("run", "seal", "compare")


@dataclass(frozen=True)
class Run:
    """A run of the ladder or of the target.

    Attributes:
        width: Hidden size.
        tokens: Training tokens.
        rate: Peak learning rate.
        seed: Training seed.
    """

    width: int
    tokens: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"ladder-{self.width}-{self.tokens // 1000}k-{self.rate * 1000:g}m-{self.seed}".replace(".", "p")


class Experiment:
    """The runs of a plan in one home.

    Attributes:
        plan: The content of bench/ladder.yaml.
        home: Where runs are sealed.
        data: The data recipe of all runs.
    """

    def __init__(self, plan: Mapping[str, Any], home: Path, corpus: Path) -> None:
        self.plan, self.home = plan, home
        (home / "recipes").mkdir(parents=True, exist_ok=True)
        self.data = home / "recipes/data.yaml"
        atomic_files.write(self.data, yaml.safe_dump(self._data_recipe(corpus), sort_keys=False))

    def _data_recipe(self, corpus: Path) -> dict[str, Any]:
        body: dict[str, Any] = yaml.safe_load((ROOT / "data_recipes/packages.yaml").read_text("utf-8"))
        kept = (*self.plan["sources"], "sums", "worked")  # problems, which every evaluation asks
        body["sources"] = [source for source in body["sources"] if source["name"] in kept]
        body["heldout_fraction"] = self.plan["heldout_fraction"]
        for source in body["sources"]:
            if source["name"] in self.plan["sources"]:
                # A copy: sources share their reader in the file.
                source["reader"] = {
                    **source["reader"],
                    "path": str(corpus),
                    "lock": str(ROOT / "data_recipes/pypi.lock.yaml"),
                }
        return body

    def write_recipe(self, run: Run) -> Path:
        """Writes the recipe of a run, and returns its path."""
        recipe = json.loads(json.dumps(self.plan["recipe"]))
        shape, phase = self.plan["shape"], recipe["pretrain"]
        heads = run.width // shape["head_dim"]
        sizes = {"hidden_size": run.width, "moe_intermediate_size": run.width, "heads": heads, "kv_heads": heads}
        recipe["model"] |= {**shape, **sizes}
        phase["steps"] = run.tokens // phase["batch"]["global_tokens"]
        phase["optimizer"]["lr"] = run.rate
        file = self.home / "recipes" / f"{run.name}.yaml"
        names = {"name": run.name, "data": str(self.data), "training_seed": run.seed}
        atomic_files.write(file, yaml.safe_dump(names | recipe, sort_keys=False))
        return file

    def begun(self, run: Run) -> bool:
        """Returns True if the training of a run has left anything."""
        store = Store(self.home)
        graph = dag.compose(recipes.load(str(self.write_recipe(run))), store)
        return sealing.begun(store, graph.nodes[sealing.NODE].key)

    def measure(self, run: Run, scored: bool = True) -> dict[str, float]:
        """Runs a recipe until its base model is trained, or evaluated.

        Returns:
            Active parameters, tokens and FLOPs, `loss` in nats a token; if `scored`, `bits` per byte, also by source.

        Raises:
            SystemExit: With what the run printed, if it failed.
        """
        file = self.write_recipe(run)
        command = [
            sys.executable,
            "-m",
            "pipeline.cli",
            "run",
            str(file),
            "--until",
            "evaluate-base" if scored else "pretrain",
        ]
        environment = {**os.environ, "ATOM_HOME": str(self.home), "MLFLOW_TRACKING_URI": "none", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{run.name}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        store = Store(self.home)
        graph = dag.compose(recipes.load(str(file)), store)
        (point,) = ladder.read_runs([graph], store)
        figures = dict(point.figures)
        if scored:
            scores = json.loads((store.artifacts / graph.nodes["evaluate-base"].key / "scores.json").read_text())
            bits = {name: scores["bits_per_byte"][name]["value"] for name in self.plan["sources"]}
            figures |= {f"bits of {name}": value for name, value in bits.items()}
            figures["bits"] = statistics.fmean(bits.values())
        bits_text = f"  bits per byte {figures['bits']:.4f}" if scored else ""
        print(f"{run.name:<28} loss {figures['loss']:.4f}{bits_text}", flush=True)
        return figures

    def measure_all(self, runs: Sequence[Run], jobs: int, scored: bool = True) -> dict[Run, dict[str, float]]:
        """Measures runs, some at a time."""
        with ThreadPoolExecutor(jobs) as pool:
            return dict(zip(runs, pool.map(lambda run: self.measure(run, scored), runs), strict=True))


def best_rate(results: Mapping[Run, Mapping[str, float]]) -> float:
    """Returns the smallest of the rates whose mean held-out loss over all widths is within TIE of the least.

    Steps of Muon have one size at every width. With a rate of its own, each width would have the noise of one seed in
    it, as its best rates differ by less than seeds do. Of equals the smallest is taken: a large rate is more likely to
    fail in a longer run.
    """
    losses: dict[float, list[float]] = {}
    for run, figures in results.items():
        losses.setdefault(run.rate, []).append(figures["loss"])
    means = {rate: statistics.fmean(values) for rate, values in losses.items()}
    return min(rate for rate, mean in means.items() if mean <= min(means.values()) + TIE)


def forecasts(points: Mapping[Run, Mapping[str, float]], at: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns {figure: value, low and high of one further run} at the parameters and tokens of the target."""
    rows = {}
    for figure in FIGURES:
        named = [ladder.Point(run.name, {**figures, "loss": figures[figure]}) for run, figures in points.items()]
        band = ladder.make(named, [("target", at)]).expectations[0].band
        rows[figure] = {"value": band.value, "low": band.low, "high": band.high}
    return rows


def seal(
    experiment: Experiment, points: Mapping[Run, Mapping[str, float]], targets: Sequence[Run], name: str = FORECAST
) -> dict[str, Any]:
    """Writes the forecast of a target, or returns the one that was written before its runs.

    Raises:
        SystemExit: If the target has begun without a forecast, or the forecast is one of other runs.
    """
    file = experiment.home / name
    names = [run.name for run in points], [run.name for run in targets]
    if file.exists():
        body: dict[str, Any] = json.loads(file.read_text())
        if ([row["name"] for row in body["points"]], body["target"]["names"]) != names:
            raise SystemExit(f"{file} is a forecast from or of other runs; take another --home")
        return body
    if any(experiment.begun(run) for run in targets):
        raise SystemExit("a run of the target has begun, and a forecast is sealed before that; take another --home")
    store = Store(experiment.home)
    graph = dag.compose(recipes.load(str(experiment.write_recipe(targets[0]))), store)
    at = ladder.size_of(graph)
    rows = [{"name": run.name, **figures} for run, figures in points.items()]
    body = {
        "target": {"names": [run.name for run in targets], **at},
        "forecasts": forecasts(points, at),
        "points": rows,
    }
    atomic_files.write(file, json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return body


def targets_of(target: Mapping[str, Any], rate: float) -> list[Run]:
    """Returns the runs of a target, which is not tuned."""
    return [Run(target["width"], target["tokens"], rate, seed) for seed in target["seeds"]]


def show(sealed: Mapping[str, Any]) -> None:
    for figure, band in sealed["forecasts"].items():
        print(
            f"forecast of {FIGURES[figure]}: {band['value']:.4f} ({band['low']:.4f} to {band['high']:.4f})", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where runs are kept; default: a temporary folder")
    parser.add_argument(
        "--corpus", type=Path, default=ROOT / "corpora/packages/pypi", help="where the packages are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step")
    options = parser.parse_args()
    plan = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    fetch = [sys.executable, "-m", "stages.data.acquire.packages.fetch", "locked"]
    subprocess.run([*fetch, str(ROOT / "data_recipes/pypi.lock.yaml"), str(options.corpus)], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.home or Path(scratch) / "home").absolute()
        return compare(Experiment(plan, home, options.corpus.absolute()), options.jobs, options.until)


def compare(experiment: Experiment, jobs: int, until: str) -> int:
    """Makes the runs up to a step, and prints what they show."""
    plan = experiment.plan
    seeds, budgets = plan["seeds"], plan["tokens"]
    tried = [Run(width, budgets[0], rate, seeds[0]) for width in plan["widths"] for rate in plan["rates"]]
    experiment.measure(tried[0], scored=False)  # alone, since all others need its data
    tuning = experiment.measure_all(tried, jobs, scored=False)
    rate = best_rate(tuning)
    print(f"rate of all widths: {rate:g}", flush=True)
    # The longest first, so that no core waits at the end.
    sizes = sorted(itertools.product(plan["widths"], budgets, seeds), key=lambda size: -(size[0] ** 2) * size[1])
    points = experiment.measure_all([Run(width, tokens, rate, seed) for width, tokens, seed in sizes], jobs)
    points = dict(sorted(points.items(), key=lambda row: row[0].name))
    report: dict[str, Any] = {
        "rate": rate,
        "tuning": [{"name": run.name, **figures} for run, figures in tuning.items()],
    }
    if until == "run":
        return 0

    targets = targets_of(plan["target"], rate)
    sealed = seal(experiment, points, targets)
    show(sealed)
    if until == "seal":
        return 0

    measured = experiment.measure_all(targets, jobs)
    report["measured"] = [{"name": run.name, **figures} for run, figures in measured.items()]
    ratios = {}
    for figure, band in sealed["forecasts"].items():
        values = [figures[figure] for figures in measured.values()]
        inside = sum(band["low"] <= value <= band["high"] for value in values)
        shown = ", ".join(f"{value:.4f}" for value in values)
        print(f"{FIGURES[figure]}: {shown}; {inside} of {len(values)} inside the band")
        ratios[figure] = [value / band["value"] for value in values]
    atomic_files.write(experiment.home / SUMMARY, json.dumps({**sealed, **report}, indent=1, sort_keys=True) + "\n")
    print("next:")
    show(seal(experiment, {**points, **measured}, targets_of(plan["next"], rate), NEXT))
    bits = ratios["bits"]
    result = {"ratio": statistics.fmean(bits), "low": min(bits), "high": max(bits), "target": 1.0, "unit": "x"}
    print(json.dumps({"name": "ladder", **result, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
