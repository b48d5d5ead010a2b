"""Proposes a mix of packages by `atom mix`, and compares it with the natural and a hand-made one on larger runs.

    .venv/bin/python bench/mixture.py --home runs/mixture    # everything, in order; 40 minutes on two cores

The text is that of data_recipes/packages.yaml, with a part of its Debian packages; what is missing is fetched first.
bench/mixture.yaml has the sizes. Proxies are run with drawn mixes and a law is fitted, in which all sources count
equally. Then runs of a larger model on more tokens are made with each mix and several seeds, and scored on held-out
packages. The differences have 95 % intervals over seeds (Student's), in which runs of one seed are pairs.

Runs are sealed in the home: a run that was stopped goes on. The last line is one JSON object; its ratio is the bits per
byte of the natural mix divided by those of the proposed one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from intervals import interval

from pipeline.core import atomic_files
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.prediction import mixtures

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"debian": ROOT / "bench/debian_part.lock.yaml", "pypi": ROOT / "data_recipes/pypi.lock.yaml"}


class Experiment:
    """The runs of a plan in one home.

    Attributes:
        plan: The content of bench/mixture.yaml.
        home: Where runs are sealed.
        jobs: Runs at a time.
        folder: Where the recipes are.
    """

    def __init__(self, plan: Mapping[str, Any], home: Path, jobs: int) -> None:
        self.plan, self.home, self.jobs, self.folder = plan, home, jobs, home / "recipes"

    def write(self, name: str, body: Mapping[str, Any]) -> Path:
        """Writes a file of the experiment, and returns its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write(self.folder / f"{name}.yaml", yaml.safe_dump(body, sort_keys=False))
        return self.folder / f"{name}.yaml"

    def fetch(self, corpus: Path) -> None:
        """Fetches the packages that are missing, and writes the data recipe."""
        for name, lock in LOCKS.items():
            command = [sys.executable, "-m", "stages.data.acquire.packages.fetch", "locked", str(lock)]
            subprocess.run([*command, str(corpus / name)], cwd=ROOT, check=True)
        body: dict[str, Any] = yaml.safe_load((ROOT / "data_recipes/packages.yaml").read_text("utf-8"))
        kept = (*self.plan["sources"], "sums", "worked")  # problems, which every evaluation asks
        body["sources"] = [source for source in body["sources"] if source["name"] in kept]
        body["heldout_fraction"] = self.plan["heldout_fraction"]
        for source in body["sources"]:
            if source["name"] in self.plan["sources"]:
                name = "pypi" if source["name"].startswith("python") else "debian"
                # A copy: sources share their reader in the file.
                source["reader"] = {**source["reader"], "path": str(corpus / name), "lock": str(LOCKS[name])}
                source |= {"tree_digest": "auto", "parts": self.plan["parts"]}
                source["expected"] = self.plan["expected"].get(source["name"], source["expected"])
        self.write("data", body)

    def recipe(self, name: str, size: Mapping[str, Any], mix: Mapping[str, float] | None = None, seed: int = 0) -> Path:
        """Writes the recipe of a run, with the hand-made mix unless another one is given."""
        body = json.loads(json.dumps(self.plan["recipe"]))
        phase, heads = body["pretrain"], size["width"] // body["model"]["head_dim"]
        sizes = {"hidden_size": size["width"], "moe_intermediate_size": size["width"]}
        body["model"] |= {**sizes, "heads": heads, "kv_heads": heads}
        phase["steps"] = size["tokens"] // phase["batch"]["global_tokens"]
        phase["optimizer"]["lr"] = size["rate"]
        if mix is not None:
            phase["mix"] = {source: weight for source, weight in mix.items() if weight}
        return self.write(name, {"name": name, "data": "data.yaml", "training_seed": seed, **body})

    def propose(self) -> dict[str, Any]:
        """Runs `atom mix`, and returns the content of mix.json."""
        files = [str(self.recipe(name, self.plan[name])) for name in ("proxy", "target")]
        command = [sys.executable, "-m", "pipeline.cli", "mix", files[0], "--for", files[1]]
        options = ["--runs", str(self.plan["runs"]), "--jobs", str(self.jobs), "--out", str(self.home)]
        subprocess.run([*command, *options], cwd=ROOT, check=True)
        report: dict[str, Any] = json.loads((self.home / "mix.json").read_text())
        return report

    def measure(self, mixes: Mapping[str, Mapping[str, float]]) -> dict[str, list[dict[str, float]]]:
        """Returns {mix: bits per byte by source, of each seed} of the larger runs."""
        files = {
            (name, seed): self.recipe(f"{name}-{seed}", self.plan["target"], mix, seed)
            for seed in self.plan["seeds"]
            for name, mix in mixes.items()
        }
        mixtures.run_all(list(files.values()), self.jobs, "local")
        store, scores = Store(self.home), dict[str, list[dict[str, float]]]()
        for (name, _), file in files.items():
            bits = mixtures.bits_of(dag.compose(recipes.load(str(file)), store), store)
            scores.setdefault(name, []).append({source: bits[source] for source in self.plan["sources"]})
        return scores


def compare(report: Mapping[str, Any], scores: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Prints the bits of each mix and their differences from the proposed one, and returns the last line.

    Args:
        report: The content of mix.json.
        scores: Bits per byte by source, of each seed, by mix.
    """
    means = {name: [statistics.fmean(row.values()) for row in rows] for name, rows in scores.items()}
    for name, rows in scores.items():
        by_source = {source: statistics.fmean(row[source] for row in rows) for source in rows[0]}
        shown = ", ".join(f"{source} {value:.4f}" for source, value in by_source.items())
        print(f"{name:<9} {statistics.fmean(means[name]):.4f} bits per byte; {shown}")
        above, low, high = interval([a - b for a, b in zip(means[name], means["proposed"], strict=True)])
        expected = report["mixes"][name]["above"]["value"]
        if name != "proposed":
            print(f"  above proposed: {above:+.4f} ({low:+.4f} to {high:+.4f}); expected of proxies {expected:+.4f}")
    pairs = zip(means["natural"], means["proposed"], strict=True)
    ratio, low, high = interval([natural / proposed for natural, proposed in pairs])
    return {"name": "mixture", "ratio": ratio, "low": low, "high": high, "target": 1.0, "unit": "x"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where runs are kept; default: a temporary folder")
    parser.add_argument("--corpus", type=Path, default=ROOT / "corpora/packages", help="where the packages are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    plan = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.home or Path(scratch) / "home").absolute()
        os.environ |= {"ATOM_HOME": str(home), "MLFLOW_TRACKING_URI": "none"}
        experiment = Experiment(plan, home, options.jobs)
        experiment.fetch(options.corpus.absolute())
        report = experiment.propose()
        scores = experiment.measure({name: row["weights"] for name, row in report["mixes"].items()})
        result = compare(report, scores)
        atomic_files.write(home / "mixture.json", json.dumps({**result, "scores": scores}, indent=1) + "\n")
    print(json.dumps({**result, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
