"""Forecasts the bits per byte of atom-1b-a300m at its budget from the published runs of another mixture of experts.

    .venv/bin/python bench/anchor.py            # prints the forecast, and compares it with the sealed file
    .venv/bin/python bench/anchor.py --seal     # writes the file, which is refused where one of other content is

bench/forecasts/marin.csv has the best runs of Marin's sweep of mixtures of experts from 1e18 to 3e20 FLOPs, and their
run of 1e21: bits per byte of the English part of C4 (experiments/grug/moe/README.md of
github.com/marin-community/marin, commit 04331363; issue 4447 there). Their README also fits the sizes and tokens of the
best runs: N = 1.09e-2 C^0.535 active parameters and T = 16.0 C^0.464 tokens for C training FLOPs. Neither N nor C
counts the table of the vocabulary, and neither does this file.

atom-1b-a300m is smaller and reads far more tokens than the best run of its FLOPs, since it is made to be served. So its
FLOPs alone do not say its loss. Where both terms of L = E + A/N^alpha + B/T^beta are equally well spent, which the best
runs are, a law L = E + K C^-gamma of them gives each: alpha = gamma / 0.535, beta = gamma / 0.464, and the reducible
loss is shared as beta to alpha. From the best run with the parameters of atom-1b-a300m, the term of tokens then falls
by the tokens that atom-1b-a300m reads beyond it.

    low     the best run of equal FLOPs: nothing is lost by the small size
    high    the best run of equal parameters: nothing is gained by the further tokens

What this assumes: Marin's architecture (a shared expert, gates, biases and no balancing loss), its data and its
tokenizer, which atom-1b-a300m has not, and a law far beyond the tokens of its runs. Whether N counts the table, or
attention by its FLOPs, moves the forecast by 0.01. The last line is one JSON object; its ratio is the forecast divided
by the bits of the best run of equal FLOPs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.prediction import ladder
from stages.evaluation.scaling_laws import power_law, predicted_loss

ROOT = Path(__file__).resolve().parent.parent
POINTS, FILE = ROOT / "bench/forecasts/marin.csv", ROOT / "bench/forecasts/atom-1b-a300m.json"
# Active parameters and tokens of the best run of C FLOPs, by Marin's README: factor and exponent.
SIZE, TOKENS = (1.09e-2, 0.535), (16.0, 0.464)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seal", action="store_true", help="write the forecast")
    options = parser.parse_args()
    with POINTS.open() as file:
        rows = list(csv.DictReader(file))
    law = power_law([float(row["flops"]) for row in rows], [float(row["c4_bits"]) for row in rows])
    graph = dag.compose(recipes.load("atom-1b-a300m"), Store(Path("unused")), without_data=True)
    run = ladder.size_of(graph)
    config: Any = graph.nodes["pretrain"].config
    table = config.padded_vocab_size * config.model.hidden_size
    run = {**run, "parameters": run["parameters"] - table, "flops": run["flops"] - 6 * table * run["tokens"]}

    # The best run with as many active parameters.
    flops = (run["parameters"] / SIZE[0]) ** (1 / SIZE[1])
    tokens = TOKENS[0] * flops ** TOKENS[1]
    alpha, beta = law["b"] / SIZE[1], law["b"] / TOKENS[1]
    reducible = law["a"] * flops ** -law["b"]
    of_size, of_tokens = reducible * beta / (alpha + beta), reducible * alpha / (alpha + beta)
    value = law["c"] + of_size + of_tokens * (run["tokens"] / tokens) ** -beta
    low, high = float(predicted_loss(law, run["flops"])), float(predicted_loss(law, flops))

    body = {
        "figure": "bits per byte of the English part of C4 after pre-training",
        "target": {"recipe": "atom-1b-a300m", **run},
        "law": {**law, "alpha": alpha, "beta": beta},
        "best_of_equal_parameters": {"flops": flops, "tokens": tokens},
        "forecast": {"value": value, "low": low, "high": high},
        "points": rows,
    }
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
    if FILE.exists() and FILE.read_text() != text:
        raise SystemExit(f"{FILE.name} is another forecast; a forecast is sealed once")
    if options.seal:
        atomic_files.write(FILE, text)
    print(f"bits per byte = {law['c']:.4f} + {law['a']:.4g} C^-{law['b']:.4f}, of {len(rows)} published runs")
    size = f"{run['parameters']:.3g} active parameters, {run['tokens']:.3g} tokens, {run['flops']:.3g} FLOPs"
    print(f"atom-1b-a300m: {size}")
    print(f"the best run with as many parameters reads {tokens:.3g} tokens")
    print(
        f"forecast: {value:.3f} bits per byte; {low:.3f} if size cost nothing, {high:.3f} if more tokens gave nothing"
    )
    result = {"ratio": value / low, "low": 1.0, "high": high / low, "target": 1.0, "unit": "x"}
    print(json.dumps({"name": "anchor", **result, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
