"""The parts of the soak about simulated ranks: of the recipes for clusters at full size, and of layouts drawn at random.

python -m tests.soak.simulated_ranks SEED NUMBER [COUNT]    # COUNT draws of a seed from NUMBER on, each as one line
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core.stage import RankSimulation
from stages.models.base import Rows
from stages.rl.estimates import fullest_row
from stages.train.config import SftConfig, TrainConfig, TrainerConfig
from stages.train.estimate import rank_memory
from tests.fixtures import ROOT, long_recipe_fixtures, rank_simulation_fixtures, train_fixtures
from tests.soak.layouts import Cells, Step

HEAD = ["rank", "parameters", "state, GiB", "peak, GiB", "planned, GiB", "difference", "sent a step, GB", "minutes", "memory used"]  # fmt: skip
TOLERANCE = 0.05
TOLERANCE_OF_DRAWS, MEDIAN_OF_DRAWS = 0.1, 0.02
RANKS = (
    ("atom-1b-a300m", "pretrain", 0),
    ("atom-1b-a300m", "longcontext-2", 0),
    ("atom-30b-a3b", "pretrain", 0),
    ("atom-30b-a3b", "pretrain", 128),
    ("atom-30b-a3b", "longcontext-1", 128),
    ("atom-30b-a3b", "longcontext-2", 0),
    ("atom-235b-a22b", "pretrain", 0),
    ("atom-235b-a22b", "pretrain", 448),
    ("atom-235b-a22b", "longcontext-1", 448),
    ("atom-235b-a22b", "longcontext-2", 0),
)
"""One rank of each kind of layout, of a pipeline its first and its last stage: (recipe, phase, rank)."""


def steps() -> dict[str, Step]:
    packaged = {f"{name}, {phase}, rank {rank}": partial(simulate, name, phase, rank) for name, phase, rank in RANKS}
    return packaged | {"a million tokens, rank 0": simulate_million_tokens}


def simulate_million_tokens(folder: Path) -> Cells:
    return simulate(long_recipe_fixtures.write_recipe(folder), long_recipe_fixtures.PHASE, 0, folder)


def simulate(recipe: str, phase: str, rank: int, folder: Path) -> Cells:
    """Raises SystemExit if the plan's parameters are others, or its memory is off by more than TOLERANCE."""
    command = [sys.executable, "-m", "pipeline.cli", "plan", recipe, "--only", phase, "--simulate", str(rank), "--json"]
    began = time.monotonic()
    environment = {**os.environ, "ATOM_HOME": str(folder)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"soak: {' '.join(command)} failed; its last lines are above")
    minutes = (time.monotonic() - began) / 60
    result, gib = json.loads(output)["simulations"][phase], 2**30
    difference = result["planned_peak_bytes"] / result["peak_bytes"] - 1
    if abs(difference) > TOLERANCE or result["parameters"] != result["planned_parameters"]:
        raise SystemExit(f"soak: the plan of {recipe}, {phase} is not what rank {rank} needs: {result}")
    sent = sum(row["bytes"] * row["calls"] for row in result["traffic"] if row["ranks"] > 1)
    return [
        f"{result['parameters']:,}",
        f"{result['state_bytes'] / gib:.2f}",
        f"{result['peak_bytes'] / gib:.2f}",
        f"{result['planned_peak_bytes'] / gib:.2f}",
        f"{difference:+.1%}",
        f"{sent / 1e9:,.0f}",
        f"{minutes:.1f}",
        f"{usage.ru_maxrss / 2**20:.2f} GiB",
    ]


# -- layouts drawn at random ------------------------------------------------------------------------------------------

DRAWN_HEAD = ["draws", "ranks", "median difference", "largest", "largest peak, GiB"]
DRAWS = 24
SMALLEST = 2**28
"""Bytes of the smallest planned peak: of less, a few tensors of the schedule can be a tenth."""
SEED = int(os.environ.get("ATOM_DRAW_SEED", "7"))
"""The draws of other seeds are other layouts: ATOM_DRAW_SEED chooses one."""
MODEL: dict[str, tuple[Any, ...]] = {
    "layers": (2, 4, 8), "hidden_size": (256, 512, 1024, 1536), "heads": (8, 16, 32), "kv_heads": (2, 4, 8),
    "head_dim": (32, 64, 128), "tie_embeddings": (True, False),
}  # fmt: skip
EXPERTS: dict[str, tuple[Any, ...]] = {
    "experts": (4, 8, 16, 64), "num_experts_per_tok": (2, 4, 8), "moe_intermediate_size": (64, 128, 256, 768),
    "z_loss": (0, 0, 1e-3),
}  # fmt: skip
DENSE: dict[str, tuple[Any, ...]] = {"dense_layers": (0, 0, 1), "intermediate_size": (512, 2048, 4096)}
GROUPS: dict[str, tuple[Any, ...]] = {"n_shared_experts": (1, 2), "routed_scaling_factor": (1.0, 2.5)}
ARCHITECTURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen3": MODEL | {"intermediate_size": (512, 2048, 4096)},
    "qwen3_moe": MODEL | EXPERTS | DENSE | {
        "balance": ("batch", "global", "sequence"),
    },
    "deepseek_v3": {name: MODEL[name] for name in ("layers", "hidden_size", "heads", "tie_embeddings")}
    | EXPERTS | DENSE | GROUPS | {
        "q_lora_rank": (None, 128, 384), "kv_lora_rank": (64, 256), "qk_nope_head_dim": (32, 64, 128),
        "qk_rope_head_dim": (16, 32, 64), "v_head_dim": (32, 64, 128),
    },
    "glm4_moe": MODEL | EXPERTS | DENSE | GROUPS | {
        "tie_embeddings": (False,), "attention_bias": (True, False), "use_qk_norm": (True, False),
        "partial_rotary_factor": (0.5, 1.0),
    },
}  # fmt: skip
LAYOUT: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4, 8), "pp": (1, 1, 2, 4), "vpp": (1, 1, 2), "cp": (1, 1, 2, 4), "ep": (1, 2, 4, 8, 16),
    "etp": (None, 1, 1), "recompute": ("none", "none", "layer"),
    "overlap_gradients": (None, True), "deterministic": (False, False, False, True),
}  # fmt: skip
LENGTHS = (256, 1024, 2048, 4096, 8192, 16384, 131072)
KINDS = ("text", "text", "text", "sft", "rlvr", "dpo", "reward")
"""Of a phase; `sft` has adapters."""


def draw(seed: int, number: int) -> tuple[str, dict[str, Any], int]:
    """(kind of the phase, its config, rank) of a draw: of what is possible, every setting is chosen by itself. The rank
    is the first of a stage: of the context ranks it sees the most keys, and the plan is of the fullest rank."""
    chance, pick = random.Random(f"{seed} {number}"), lambda options: {k: chance.choice(v) for k, v in options.items()}
    architecture = sorted(ARCHITECTURES)[number % len(ARCHITECTURES)]
    while True:
        kind, model, layout = chance.choice(KINDS), pick(ARCHITECTURES[architecture]), pick(LAYOUT)
        model["architecture"] = architecture
        if model.get("dense_layers") == 0:
            del model["intermediate_size"]
        data, length = chance.choice((1, 1, 2, 4)), chance.choice(LENGTHS)
        layout["ranks"] = layout["tp"] * layout["pp"] * layout["cp"] * data
        model["context_length"], vocabulary = max(length, 2048), chance.choice((4096, 32768, 131072))
        phase: dict[str, Any] = {"precision": chance.choice(("bf16", "bf16", "bf16", "fp32")), "parallelism": layout}
        is_slow = phase["precision"] == "fp32"  # attention by slices
        takes_long = model["layers"] > 2 * layout["pp"] or model.get("experts", 0) > 16 * layout["ep"]
        is_long = length > 16384
        takes_long |= (is_slow and length > 1024) or (is_long and (kind != "text" or layout["pp"] * layout["vpp"] > 2))
        if takes_long:
            continue
        rows, micro_batches = 1 if is_long else chance.choice((1, 1, 2, 4)), data * chance.choice((1, 4))
        if kind in ("text", "sft"):
            batch = {"micro_tokens": rows * length, "global_tokens": micro_batches * rows * length}
            text = {"sequence_length": length, "batch": batch, "pack": chance.random() < 0.5}
            body = {
                "model": model,
                "phase": train_fixtures.PHASE | text | phase,
                "padded_vocab_size": vocabulary,
                "seed": 0,
            }
            targets = chance.choice((("attention",), ("attention", "mlp"), ("mlp",)))
            if kind == "sft":
                body["phase"]["lora"] = {"rank": chance.choice((8, 64)), "alpha": 16, "targets": targets}
        else:
            phase |= (
                {"sampling": {"max_new_tokens": min(length, 512 if is_slow else 2048) // 2}} if kind != "reward" else {}
            )
            phase |= pick({"updates": (1, 2), "kl_coef": (None, 0.1)}) if kind == "rlvr" else {}
            body = rank_simulation_fixtures.post_training(kind, layout, model, vocabulary, **phase)
        place = chance.choice((0, layout["pp"] - 1))
        try:
            config = configured(kind, body)
        except ValidationError:
            continue
        if sum(rank_memory(config, rows_of(kind, config), place)[1:]) >= SMALLEST:
            return kind, body, place * (layout["ranks"] // layout["pp"])


def rows_of(kind: str, config: TrainerConfig) -> Rows:
    """A micro-batch of a phase, as the plan sees it."""
    if kind in ("text", "sft"):
        assert isinstance(config, TrainConfig)
        return Rows(config.phase.micro_rows, config.phase.sequence_length, config.phase.pack)
    estimate, length = fullest_row(config)
    return estimate.row(length)


def configured(kind: str, body: dict[str, Any]) -> TrainerConfig:
    types = rank_simulation_fixtures.CONFIGS | {"sft": SftConfig}
    config: TrainerConfig = types[kind].model_validate(body)
    return config


def compare_draw(seed: int, number: int) -> dict[str, Any]:
    """A draw and what it needs: `difference` is planned / simulated - 1 of the peak."""
    kind, body, rank = draw(seed, number)
    simulator = rank_simulation_fixtures.simulation("text" if kind == "sft" else kind)
    result: RankSimulation = simulator.simulate(configured(kind, body), rank)
    difference = round(result.planned_peak_bytes / result.peak_bytes - 1, 5)
    is_counted = result.parameters == result.planned_parameters
    line = {"seed": seed, "number": number, "difference": difference, "peak_bytes": result.peak_bytes}
    line |= {"counts": is_counted, "kind": kind, "rank": rank, "config": body}
    print(json.dumps(line), flush=True)
    return line


def drawn_steps() -> dict[str, Step]:
    names = enumerate(sorted(ARCHITECTURES))
    return {f"seed {SEED}, {name}": partial(compare_draws, SEED, number) for number, name in names}


def compare_draws(seed: int, architecture: int, _: Path) -> Cells:
    """Raises SystemExit, with each draw that is off by more than TOLERANCE_OF_DRAWS, or whose parameters are others, or
    if half of the draws are off by more than MEDIAN_OF_DRAWS."""
    lines = [compare_draw(seed, number) for number in range(architecture, DRAWS, len(ARCHITECTURES))]
    sizes = [abs(line["difference"]) for line in lines]
    if statistics.median(sizes) > MEDIAN_OF_DRAWS:
        wrong = lines
    else:
        wrong = [line for line in lines if abs(line["difference"]) > TOLERANCE_OF_DRAWS or not line["counts"]]
    if wrong:
        raise SystemExit("\n".join(["soak: the plan is not what these ranks need:", *map(json.dumps, wrong)]))
    largest = max(line["peak_bytes"] for line in lines) / 2**30
    return [str(len(lines)), f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}", f"{largest:.2f}"]


def main(seed: int, number: int, count: int = 1) -> None:
    for each in range(number, number + count):
        compare_draw(seed, each)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
