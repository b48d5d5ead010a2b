"""The ladder of atom-tiny: held-out loss against pre-training compute, and what it says of the next rung.

    .venv/bin/python bench/ladder.py --plot ladder.png --json ladder.json     # about five minutes on two cores
    .venv/bin/python bench/ladder.py --quick                                  # to see that it works

Five sizes of atom-tiny's shape, two seeds each, are pre-trained from scratch on its corpus and mix by the stages
themselves (order and pretrain; rows are packed, so that none of the compute is padding), with as many tokens for each
active parameter. Two runs at a time, one thread each. To loss L and training FLOPs C a power law L = a C^-b + c is
fitted: least squares of log(L - c) against log C for each c of a grid, of which that with the least error of log L is
kept. The band is the middle 90 % of fits to runs drawn with replacement.

The last line is one JSON object. `ratio` is the loss of the largest size that a law fitted to the smaller ones
predicts, divided by the measured one; low and high are the same of the bootstrap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stages.evaluation.scaling_law import fit, predicted_loss  # noqa: E402

BATCH, LENGTH = 1536, 64
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Ladder:
    """(layers, hidden size) of each rung, tokens of an active parameter, seeds, and the recipe whose data are read."""

    rungs: tuple[tuple[int, int], ...]
    tokens: float
    seeds: int
    recipe: str


FULL = Ladder(((1, 32), (2, 48), (2, 64), (3, 80), (3, 96)), 6.0, 2, "atom-tiny")
QUICK = Ladder(((1, 16), (1, 32), (1, 48), (2, 48)), 0.4, 1, "atom-smoke")


def composed(recipe: str, home: Path) -> Any:
    from pipeline.core.store import Store
    from pipeline.graph import dag as graph
    from pipeline.graph import recipe as recipes

    return graph.compose(recipes.load(recipe), Store(home))


def train(recipe: str, home: Path, rung: tuple[int, int], tokens: float, seed: int, folder: Path) -> dict[str, Any]:
    """One run, in this process."""
    from pipeline.core.stage import Report
    from pipeline.core.store import Store, write_manifest
    from stages.data import order
    from stages.train import pretrain

    class Quiet:
        lease = None

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    graph = composed(recipe, home)
    base, vocab = graph.recipe.config, graph.recipe.config.tokenizer.padded_vocab_size
    layers, hidden = rung
    shape = {"layers": layers, "hidden_size": hidden, "heads": hidden // 16, "kv_heads": 1, "head_dim": 16}
    model = base.model.model_copy(update={**shape, "moe_intermediate_size": hidden})
    active = model.parameters(vocab)["active"]
    steps = max(8, round(tokens * active / BATCH))
    optimizer = base.pretrain.optimizer.model_copy(update={"warmup_steps": max(2, steps // 10), "final_lr": 3e-4})
    phase = {
        "mix": base.pretrain.mix, "sequence_length": LENGTH, "steps": steps, "pack": True,
        "batch": {"global_tokens": BATCH, "micro_tokens": BATCH}, "optimizer": optimizer,
        "validation": {"every": steps, "rows": 192}, "release_checkpoint_interval": steps,
    }  # fmt: skip
    settings = {"model": model, "phase": phase, "padded_vocab_size": vocab, "seed": seed}
    config = pretrain.STAGE.config.model_validate(settings)
    inputs = {"tokens": Store(home).open(graph.nodes["tokenize"].key)}
    order_config = {"phase": "pretrain", "mix": base.pretrain.mix, "sequence_length": LENGTH, "rows": BATCH // LENGTH}
    report: Report = Quiet()  # type: ignore[assignment]
    for name, stage, chosen in (
        (
            "order",
            order.STAGE,
            order.STAGE.config.model_validate(order_config | {"steps": steps, "seed": seed, "pack": True}),
        ),
        ("pretrain", pretrain.STAGE, config),
    ):
        work, out = folder / f"{name}-work", folder / name
        work.mkdir(parents=True)
        out.mkdir()
        stage.run(chosen, inputs, work, out, report)
        if name == "order":
            inputs["order"] = write_manifest(out, "order-ladder")
    summary = json.loads((folder / "pretrain" / "summary.json").read_text())
    slots = steps * BATCH
    return {
        "size": f"{active / 1000:.0f}k active", "parameters": model.parameters(vocab)["total"], "active": active,
        "seed": seed, "steps": steps, "tokens": slots, "flops": slots * model.flops_per_token(vocab, LENGTH),
        "loss": summary["heldout_loss"]["last"],
    }  # fmt: skip


def measure(ladder: Ladder, home: Path) -> list[dict[str, Any]]:
    """Every run, each in a process of its own, the longest first. Raises SystemExit if one fails."""
    alone = {**os.environ, "ATOM_HOME": str(home), "PYTHONPATH": str(ROOT)}
    alone |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

    def started(*arguments: str) -> str:
        process = subprocess.run([sys.executable, "-P", *arguments], env=alone, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr[-2000:]}")
        return process.stdout

    started("-m", "pipeline.cli", "run", ladder.recipe, "--until", "tokenize")
    runs = [(rung, seed) for rung in reversed(range(len(ladder.rungs))) for seed in range(ladder.seeds)]
    with ThreadPoolExecutor(2) as pool:
        name = ["--quick"] if ladder is QUICK else []
        one = lambda run: started(__file__, *name, "--home", str(home), "--one", str(run[0]), str(run[1]))  # noqa: E731
        results = [json.loads(text.splitlines()[-1]) for text in pool.map(one, runs)]
    return sorted(results, key=lambda run: (run["flops"], run["seed"]))


def bootstrap(runs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Laws of runs drawn with replacement, of which at least three are of different sizes."""
    rng, laws = np.random.default_rng(0), []
    while len(laws) < BOOTSTRAPS:
        sample = [runs[i] for i in rng.integers(len(runs), size=len(runs))]
        if len({run["size"] for run in sample}) >= 3:
            laws.append(fit([run["flops"] for run in sample], [run["loss"] for run in sample]))
    return laws


def report(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is plotted, the last line)."""
    law = fit([run["flops"] for run in runs], [run["loss"] for run in runs])
    laws = bootstrap(runs)
    grid = np.geomspace(runs[0]["flops"] / 1.5, runs[-1]["flops"] * 3, 60)
    low, high = np.quantile([predicted_loss(each, grid) for each in laws], (0.05, 0.95), axis=0)
    curve = {
        "flops": grid.tolist(),
        "loss": predicted_loss(law, grid).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
    last = [run for run in runs if run["size"] == runs[-1]["size"]]
    smaller = [run for run in runs if run["size"] != runs[-1]["size"]]
    measured, flops = float(np.mean([run["loss"] for run in last])), last[0]["flops"]
    ratio = float(predicted_loss(fit([r["flops"] for r in smaller], [r["loss"] for r in smaller]), flops)) / measured
    drawn = [float(predicted_loss(each, flops)) / measured for each in bootstrap(smaller)]
    bounds = [*np.quantile(drawn, (0.05, 0.95)).tolist(), ratio]
    return {"runs": runs, "law": law, "curve": curve}, {
        "name": "ladder", "ratio": round(ratio, 4), "low": round(min(bounds), 4), "high": round(max(bounds), 4),
        "target": 1.0, "unit": "held-out loss of the largest size, predicted from the smaller ones by measured",
        "machine": f"{platform.machine()}, 2 processes of 1 thread, {len(runs)} runs",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models for a few steps; the figures mean nothing")
    parser.add_argument("--plot", type=Path, help="where to write the PNG")
    parser.add_argument("--json", type=Path, help="where to write runs, law and band")
    parser.add_argument("--home", type=Path, help="an ATOM_HOME whose data stages are taken, or made")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ladder = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        if arguments.one:
            rung, seed = arguments.one
            home = arguments.home
            print(json.dumps(train(ladder.recipe, home, ladder.rungs[rung], ladder.tokens, seed, Path(folder))))
            return
        result, line = report(measure(ladder, arguments.home or Path(folder)))
    print(f"{'size':>14}{'parameters':>12}{'seed':>6}{'tokens':>11}{'FLOPs':>11}{'held-out loss':>15}{'law':>9}")
    for run in result["runs"]:
        print(f"{run['size']:>14}{run['parameters']:12,}{run['seed']:6}{run['tokens']:11,}{run['flops']:11.3g}"
              f"{run['loss']:15.4f}{float(predicted_loss(result['law'], run['flops'])):9.4f}")  # fmt: skip
    print("L = {a:.4g} C^-{b:.4g} + {c:.4g}".format(**result["law"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    if arguments.plot:
        from release.cards import scaling_plots

        arguments.plot.write_bytes(scaling_plots.pretraining(result))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
