"""What fine-tuning learns of a new task against what it forgets of the old text, by rank, data and replay.

    .venv/bin/python bench/forgetting.py --json FILE --figure docs/forgetting.png    # three seeds, one after the other
    .venv/bin/python bench/forgetting.py --quick    # one seed, few steps: its figures mean nothing

A small dense model is pre-trained on text and code (the data of atom-smoke). From these weights each arm trains on
worked problems, which the base has not seen, at a constant rate, and is measured after so many steps:

- **full**: all weights;
- **full, 25 % replay**: all weights, and a quarter of the rows are of the base's text and code, so fewer of the task;
- **rank r**: adapters on attention and feed-forward matrices, the base frozen (`sft.lora` of a recipe).

Learnt are the bits per byte of held-out problems that fell, over loss-carrying tokens; forgotten are those of held-out
text and code that rose. A byte is counted through the tokens and bytes of the held-out documents of each source. The
last line is one JSON object: `ratio` is the bits per byte of old text after full fine-tuning, divided by those after it
with replay, both after the last step, with the 95 % interval over seeds (Student's).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from intervals import interval
from quiet import Quiet

from pipeline.core.store import Artifact, write_manifest
from release.cards.plots import COLORS, png
from stages.data.order.shards import document_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stages.train.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "atom-smoke-dense"
OLD, NEW = {"docstrings": 0.6, "code": 0.4}, {"worked": 1.0}
REPLAY = 0.25
REPLAYED = {**{name: REPLAY * share for name, share in OLD.items()}, "worked": 1 - REPLAY}
LENGTH, ROWS, HELDOUT = 128, 12, 48
BASE_STEPS, STEPS = 200, (10, 30, 100)
RATES = {"full": 1e-3, "lora": 3e-3}
"""Chosen on another seed among 1e-3, 3e-3 and 1e-2, for what was learnt against what was forgotten."""
ALPHA = 16
RANKS = (1, 4, 16, 64)
ARMS: dict[str, tuple[int | None, Mapping[str, float]]] = {
    "full": (None, NEW),
    "full, 25 % replay": (None, REPLAYED),
    **{f"rank {rank}": (rank, NEW) for rank in RANKS},
}
"""{arm: (rank, None for all weights; mix)}."""


def graph_of(home: Path) -> Any:
    from pipeline.core.store import Store
    from pipeline.graph import dag
    from pipeline.graph import recipe as recipes

    return dag.compose(recipes.load(RECIPE), Store(home))


def phase(mix: Mapping[str, float], steps: int, rate: float, rank: int | None) -> dict[str, Any]:
    """A phase at a constant rate after ten steps of warmup. rank: of adapters; None: all weights."""
    settings: dict[str, Any] = {
        "mix": mix, "sequence_length": LENGTH, "batch": {"global_tokens": ROWS * LENGTH, "micro_tokens": ROWS * LENGTH},
        "steps": steps, "validation": {"every": steps, "rows": HELDOUT}, "release_checkpoint_interval": steps,
        "optimizer": {"lr": rate, "final_lr": rate, "warmup_steps": min(10, steps // 2), "weight_decay": 0.0},
    }  # fmt: skip
    lora = {"rank": rank, "alpha": ALPHA, "targets": ["attention", "mlp"]} if rank else None
    return settings | ({"lora": lora} if lora else {})


@contextmanager
def engine_of(graph: Any, settings: Mapping[str, Any], seed: int) -> Iterator[tuple[Engine, Any]]:
    """An engine without weights, and its config."""
    from stages.train import parallel
    from stages.train.config import SftConfig
    from stages.train.engine import Engine

    recipe = graph.recipe.config
    vocabulary = recipe.tokenizer.padded_vocab_size
    config = SftConfig.model_validate(
        {"model": recipe.model, "phase": settings, "padded_vocab_size": vocabulary, "seed": seed}
    )
    with parallel.session(seed, config.phase.parallelism) as ranks:
        yield Engine(config, ranks, recipe.tokenizer.vocab_size), config


def order_of(tokens: Artifact, settings: Mapping[str, Any], seed: int, folder: Path) -> Artifact:
    """The rows of a phase, by the stage `order`."""
    from stages.data.order.order_stage import STAGE

    config = {"phase": "sft", "mix": settings["mix"], "sequence_length": LENGTH, "rows": ROWS}
    config |= {"steps": settings["steps"], "seed": seed}
    (folder / "work").mkdir(parents=True)
    (folder / "order").mkdir()
    STAGE.run(STAGE.config.model_validate(config), {"tokens": tokens}, folder / "work", folder / "order", Quiet())  # type: ignore[arg-type]
    return write_manifest(folder / "order", "order-forgetting")


class Heldout:
    """Held-out rows of old text and of the new task, and the bits per byte of a loss on them."""

    def __init__(self, tokens: Artifact) -> None:
        self.tokens = tokens
        self.tokens_per_byte = {}
        for name, mix in (("old", OLD), ("new", NEW)):
            files = [
                path for source, parts in document_files(tokens.path).items() if source in mix for _, path in parts
            ]
            rows = [row for path in files for row in pq.read_table(path).to_pylist() if row["split"] == "heldout"]
            self.tokens_per_byte[name] = sum(row["tokens"] for row in rows) / sum(row["bytes"] for row in rows)

    def measure(self, engine: Engine) -> dict[str, float]:
        """Bits per byte of `old` and `new`."""
        from stages.train.config import PhaseConfig
        from stages.train.data import RankBatch, Shards, heldout_rows

        bits = {}
        for name, mix in (("old", OLD), ("new", NEW)):
            chosen = PhaseConfig.model_validate(phase(mix, 2, 1e-3, None))
            rows = heldout_rows(self.tokens, chosen)
            batch = RankBatch.read(rows, Shards(self.tokens, "heldout"), micro_rows=ROWS, ranks=engine.ranks)
            bits[name] = engine.evaluate(batch) / math.log(2) * self.tokens_per_byte[name]
        return bits


def train(
    engine: Engine, config: Any, tokens: Artifact, order: Artifact, heldout: Heldout, measured: Sequence[int]
) -> list[dict[str, float]]:
    """Bits per byte before the first step and after the steps of `measured`."""
    from stages.train.data import Order, RankBatch, Shards

    reader, shards, points = Order(order, config.phase), Shards(tokens, "train"), []
    for step in range(config.phase.steps + 1):
        if step:
            batch = RankBatch.read(reader.rows(step), shards, config.phase.micro_rows, engine.ranks)
            engine.step(batch, config.phase.optimizer.learning_rate(step, config.phase.steps), lambda loss, norm: None)
        if step in (0, *measured):
            points.append({"step": step, "tokens": step * ROWS * LENGTH, **heldout.measure(engine)})
    return points


def run_seed(home: Path, seed: int, base_steps: int, measured: Sequence[int], folder: Path) -> dict[str, Any]:
    """{arm: its points} of one seed: of the base, of the orders and of the adapters."""
    import small_policies
    import torch

    graph = graph_of(home)
    from pipeline.core.store import Store

    tokens = Store(home).open(graph.nodes["tokenize"].key)
    heldout = Heldout(tokens)
    settings = phase(OLD, base_steps, 3e-3, None)
    with engine_of(graph, settings, seed) as (engine, config):
        engine.initialize()
        order = order_of(tokens, settings, seed, folder / f"base-{seed}")
        points = {"base": train(engine, config, tokens, order, heldout, (base_steps,))}
        base = small_policies.weights_of(engine)
    for number, (arm, (rank, mix)) in enumerate(ARMS.items()):
        settings = phase(mix, max(measured), RATES["lora" if rank else "full"], rank)
        order = order_of(tokens, settings, seed, folder / f"{number}-{seed}")
        with engine_of(graph, settings, seed) as (engine, config):
            load(engine, base)
            points[arm] = train(engine, config, tokens, order, heldout, measured)
            trained = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
            points[arm][0]["trained_parameters"] = trained
        print(f"seed {seed}, {arm}: {points[arm][-1]}", flush=True)
    return points


def load(engine: Engine, base: Mapping[str, Any]) -> None:
    """Gives an engine the weights of the base, with a fresh adapter if it has one."""
    import small_policies

    if engine.lora:
        engine.initialize()
        engine.load_frozen(base)
    else:
        small_policies.load(engine, base)


def changes(points: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(learnt, forgotten) in bits per byte after each measurement but the first."""
    begin = points[0]
    return [(begin["new"] - point["new"], point["old"] - begin["old"]) for point in points[1:]]


def draw(seeds: Sequence[Mapping[str, Any]]) -> bytes:
    """A picture of three panels: learnt and forgotten by data, and one against the other. Raises AtomError without
    matplotlib."""

    def paint(learnt: Axes, forgotten: Axes, trade: Axes) -> None:
        for color, arm in zip(COLORS, ARMS, strict=False):
            style = "--" if "replay" in arm else "-"
            columns = list(zip(*(changes(seed[arm]) for seed in seeds), strict=True))
            tokens = [point["tokens"] for point in seeds[0][arm][1:]]
            bands = [[interval([change[i] for change in column]) for column in columns] for i in (0, 1)]
            for axis, band in zip((learnt, forgotten), bands, strict=True):
                means, lows, highs = zip(*band, strict=True)
                axis.plot(tokens, means, style, color=color, linewidth=1.2, label=arm)
                axis.fill_between(tokens, lows, highs, color=color, alpha=0.12, linewidth=0)
            ends = [[mean for mean, _, _ in band] for band in bands]
            trade.plot(*ends, style, color=color, linewidth=1.2, marker="o", markersize=3, label=arm)
        for axis, title, unit in (
            (learnt, "Learnt: held-out problems", "bits per byte that fell"),
            (forgotten, "Forgotten: held-out text and code", "bits per byte that rose"),
        ):
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xscale("log")
            axis.set_xlabel("token slots of fine-tuning")
            axis.set_ylabel(unit)
        trade.set_title("Forgotten against learnt, means", loc="left", fontsize=9)
        trade.set_xlabel("learnt, bits per byte")
        trade.set_ylabel("forgotten, bits per byte")
        for axis in (learnt, forgotten, trade):
            axis.spines[["top", "right"]].set_visible(False)
        learnt.legend(fontsize=6.5, frameon=False)

    return png((13.0, 4.5), lambda figure: paint(*figure.subplots(1, 3)))


def line_of(seeds: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    mean, low, high = interval([seed["full"][-1]["old"] / seed["full, 25 % replay"][-1]["old"] for seed in seeds])
    return {
        "name": "forgetting", "ratio": round(mean, 3), "low": round(low, 3), "high": round(high, 3), "target": 1.0,
        "unit": "bits per byte of old text after full fine-tuning, by those after it with 25 % replay",
        "machine": f"{platform.machine()}, 1 process of 1 thread, {len(seeds)} seeds, {seconds:.0f} s",
    }  # fmt: skip


def make_tokens(home: Path) -> None:
    """Runs the data stages of the recipe. Raises SystemExit if one fails."""
    env = {**os.environ, "ATOM_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", RECIPE, "--until", "tokenize"]
    process = subprocess.run(
        command, env=env | {"MLFLOW_TRACKING_URI": "none"}, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps; the figures mean nothing")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="number of seeds, from 0 on")
    parser.add_argument("--json", type=Path, help="file of the points; seeds that it has are not trained again")
    parser.add_argument("--figure", type=Path, help="where to write the picture")
    parser.add_argument("--home", type=Path, help="an ATOM_HOME whose data stages are taken, or made")
    arguments = parser.parse_args()
    began = time.monotonic()
    numbers, base_steps, measured = (1, 20, (2, 4)) if arguments.quick else (arguments.seeds, BASE_STEPS, STEPS)
    seeds = json.loads(arguments.json.read_text())["seeds"] if arguments.json and arguments.json.exists() else []
    with tempfile.TemporaryDirectory() as place:
        home = arguments.home or Path(place) / "home"
        if len(seeds) < numbers:
            make_tokens(home)
        for seed in range(len(seeds), numbers):
            seeds.append(run_seed(home, seed, base_steps, measured, Path(place)))
    print(f"{'arm':<22}{'trained':>9}{'tokens':>9}{'learnt':>24}{'forgotten':>24}   bits per byte, 95 % over seeds")
    for arm in ARMS:
        for number, column in enumerate(zip(*(changes(seed[arm]) for seed in seeds), strict=True)):
            bands = [interval([change[i] for change in column]) for i in (0, 1)]
            texts = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in bands]
            first, point = seeds[0][arm][0], seeds[0][arm][number + 1]
            print(f"{arm:<22}{first['trained_parameters']:>9}{point['tokens']:>9}{texts[0]:>24}{texts[1]:>24}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seeds": seeds}, indent=1, sort_keys=True) + "\n")
    if arguments.figure:
        arguments.figure.write_bytes(draw(seeds))
    print(json.dumps(line_of(seeds, time.monotonic() - began)))


if __name__ == "__main__":
    main()
