"""The part of the soak about ranks of the recipes for clusters, simulated at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.fixtures import ROOT, long_recipe_fixtures
from tests.soak.layouts import Cells, Step

HEAD = ["rank", "parameters", "state, GiB", "peak, GiB", "planned, GiB", "difference", "sent a step, GB", "minutes", "memory used"]  # fmt: skip
TOLERANCE = 0.05
RANKS = (
    ("atom-1b-a300m", "pretrain", 0),
    ("atom-1b-a300m", "longcontext-2", 0),
    ("atom-30b-a3b", "pretrain", 0),
    ("atom-30b-a3b", "longcontext-1", 0),
    ("atom-30b-a3b", "longcontext-2", 0),
    ("atom-235b-a22b", "pretrain", 0),
    ("atom-235b-a22b", "pretrain", 256),
    ("atom-235b-a22b", "longcontext-1", 256),
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
