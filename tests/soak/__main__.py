"""What takes too long for every test run, in named parts of at most 90 minutes.

    make soak PART=layouts
    make soak PART=slurm STEP="seed 0"     # one step of a part
    python -m tests.soak [PART [STEP]]     # without a part: lists the parts

A part consists of steps. A finished step is recorded in runs/soak/, so that a part that was stopped goes on where it
was; a step that is recorded for another commit runs again. At its end a part writes its own section of runs/soak/report.md,
with date, commit and minutes. Exits with 1, and names the step, if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.fixtures import ROOT
from tests.soak import collective_order, layouts, processes, simulated_ranks, slurm_seeds
from tests.soak.layouts import Cells, Step

RECORDS = ROOT / "runs/soak"
REPORT = RECORDS / "report.md"
HEAD = """# Soak

What takes too long for every test run. `make soak PART=<part>` runs a part, which takes at most 90 minutes on two
cores, and writes its section here.
"""


@dataclass(frozen=True)
class Part:
    """steps: by name, in order. head: of the table. about: a sentence above it. environment: the virtual environment of
    the Makefile in which it runs; none: that of the command."""

    steps: Callable[[], dict[str, Step]]
    head: list[str]
    about: str
    environment: str | None = None


def run_tests(arguments: list[str], folder: Path) -> Cells:
    """Tests at length, by pytest. Raises SystemExit with what it printed if one fails."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={folder}/tests", *arguments]
    return run_at_length(command)


def run_at_length(command: list[str]) -> Cells:
    process = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "ATOM_SOAK": "1"}, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"soak: {' '.join(command)}\n{process.stdout[-5000:]}\n{process.stderr[-1000:]}")
    return [process.stdout.strip().splitlines()[-1]]


def test_steps(*selections: str) -> Callable[[], dict[str, Step]]:
    """A step for each selection of tests, as pytest takes it."""
    return lambda: {selection: lambda folder, s=selection: run_tests(s.split(), folder) for selection in selections}


def integration_tests(*names: str) -> list[str]:
    """The paths of modules of tests/integration, each in the folder of its room."""
    return [
        f"tests/integration/{path.parent.name}/{path.name}"
        for name in names
        for path in ROOT.glob(f"tests/integration/*/test_{name}.py")
    ]


def bench_step(name: str, *arguments: str) -> Callable[[], dict[str, Step]]:
    """A benchmark, whose result is its last line."""

    def run(folder: Path) -> Cells:
        figures = processes.result([sys.executable, f"bench/{name}.py", *arguments])
        return [f"{figures['ratio']} ({figures['unit']})"]

    return lambda: {f"bench/{name}.py {' '.join(arguments)}": run}


DIFFERENCE = f"Largest relative difference of loss, balance loss, gradient norm and held-out loss at any step, in fp32 on CPU over gloo; the bound is {layouts.TOLERANCE:g}."
PARTS = {
    "layouts": Part(layouts.matrix_steps, layouts.MATRIX_HEAD, f"Layouts against one process. {DIFFERENCE}"),
    "drawn-layouts": Part(
        layouts.drawn_steps, layouts.DRAWN_HEAD, f"Layouts and models drawn at random, against one process. {DIFFERENCE}"
    ),
    "checkpoints": Part(
        layouts.checkpoint_steps, layouts.CHECKPOINT_HEAD,
        f"A run stopped after step 7 in one layout and resumed in another. {DIFFERENCE}",
    ),
    "kills": Part(
        layouts.kill_steps, layouts.KILL_HEAD, "`kill -9` of one rank or all four, at random moments, in layout PP2xEP2."
    ),
    "slurm-stages": Part(
        test_steps(
            *(f"tests/slurm/test_slurm_{name}.py" for name in ("submit", "operators", "survive", "rehearsal", "relaunch", "nodes", "users", "verdicts", "watch", "tutorial"))
        ),
        ["tests", "result"], "The tests on Slurm at length: kills, node failures, daemons, a full disk.",
    ),
    "slurm": Part(
        slurm_seeds.steps, slurm_seeds.HEAD,
        "Sixteen virtual nodes, one of them bad: all stages of atom-smoke by two users in turn, every kind of disturbance "
        "once for a seed, in random order; the digests are those of a quiet run.",
    ),
    "slurm-parts": Part(
        test_steps("tests/slurm/test_slurm_parts.py"), ["tests", "result"],
        "A thousand parts in job arrays of 3 to 100 tasks: killed tasks, a dead node, a document that nobody can read.",
    ),
    "data-scale": Part(
        bench_step("data_scale", "--full"), ["benchmark", "result"],
        "Growth of the data stages up to three million documents; a ratio of 1 or more holds every limit.",
    ),
    "data-plane": Part(
        test_steps(*integration_tests("data_curate", "planted", "large_release")), ["tests", "result"],
        "Planted duplicates and leaks in a thousand parts; traces and checks of a million documents by brute force.",
    ),
    "miniatures": Part(
        test_steps(
            "tests/integration/pipeline/test_miniatures.py",
            "tests/integration/evaluation/test_task_sets.py",
            *(f"tests/slurm/test_slurm_miniatures.py -k {name}" for name in ("atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b"))
        ),
        ["tests", "result"],
        "The miniatures of the recipes for clusters on virtual nodes, from `atom pin` to a verified release, against a "
        "local Hub with small copies of what they read.",
    ),
    "slurm-servers": Part(
        test_steps("tests/slurm/test_slurm_servers.py"), ["tests", "result"],
        "Real vLLM servers in Slurm jobs beside RL: canceled, started again, orphaned; ATOM_VLLM_PYTHON names their Python.",
    ),
    "training": Part(
        test_steps(*integration_tests("adapter", "asynchronous", "cluster_recipes", "deepseek_v3", "dense_model", "device_test", "distillation", "distilled_release", "fake_quantization", "glm4_moe", "start_records", "layouts", "million_tokens", "model_rope", "precision_simulation", "probes", "rank_simulation", "ranks", "rehearsal", "replay", "replay_answers", "reward_server", "rl_rank_simulation", "reward_hack", "rlvr", "run", "seal", "slow_ranks", "spikes", "tools", "tracking", "train_loop", "verdicts")),
        ["tests", "result"],
        "Every feature in every layout, runs that are killed, stopped and simulated, and the memory of simulated layouts.",
    ),
    "simulated-ranks": Part(
        simulated_ranks.steps, simulated_ranks.HEAD,
        "Ranks of the cluster recipes at full size (`atom plan --simulate`), PyTorch's kernels; the bound is "
        f"{simulated_ranks.TOLERANCE:.0%}. Sent: the larger side of every collective with other ranks.",
    ),
    "collective-order": Part(
        collective_order.steps, collective_order.HEAD,
        "Layouts of the cluster recipes with one layer a chunk and few data ranks: what all simulated ranks issue, run "
        "through together, and the first and last rank of each stage among all ranks of the recipe.",
    ),
    "drawn-ranks": Part(
        simulated_ranks.drawn_steps, simulated_ranks.DRAWN_HEAD,
        "Simulated ranks of layouts, models and phases drawn at random against the planned peak; the bound is "
        f"{simulated_ranks.TOLERANCE_OF_DRAWS:.0%} for each and {simulated_ranks.MEDIAN_OF_DRAWS:.0%} for the median of "
        "an architecture. ATOM_DRAW_SEED chooses other draws, and `python -m tests.soak.simulated_ranks "
        "SEED NUMBER` repeats one.",
    ),
    "te": Part(
        test_steps(*(f"tests/te/test_{name}.py" for name in ("stand_ins", "saved", "interpreted", "bridge", "bridge_recipes", "answers", "training", "partial_rotary"))),
        ["tests", "result"],
        "Transformer Engine's layers on CPU against this project's, also in layouts of four, and Megatron-Bridge on an "
        "export: to run before a change to the engine is called done. It makes an environment of its own.",
        ".venv-te",
    ),
    "emulated-gpu": Part(
        test_steps(
            "tests/integration/train/test_emulated_gpu.py",
            *(
                f"-p tests.fixtures.emulated_gpu tests/integration/{tests}"
                for tests in ("rl/test_rlvr.py -k learn", "rl/test_rlvr.py -k killed_between", "rl/test_rlhf.py -k learns", "train/test_lora.py")
            ),
        ),
        ["tests", "result"],
        "The code for GPUs on an emulated one: every architecture and layout against the CPU, RL and adapters.",
    ),
    "gpu-kit": Part(
        test_steps("tests/gpu"), ["tests", "result"],
        "The kit for GPUs, as far as a CPU can run it: also what it does in processes of its own.",
    ),
    "containers": Part(
        test_steps("tests/slurm/test_slurm_containers.py"), ["tests", "result"],
        "The CPU image, built from the Dockerfile on a Debian by debootstrap, and a stage in it on Slurm.",
    ),
    "packages": Part(
        test_steps("tests/integration/data/test_packages.py"), ["tests", "result"],
        "The data recipe `packages`, fetched from Debian and PyPI, to the order of pre-training.",
    ),
    "benchmarks": Part(
        test_steps("tests/integration/pipeline/test_bench.py"), ["tests", "result"], "Every benchmark on a tiny model.",
    ),
    "release": Part(
        test_steps(*integration_tests("adapter", "big_uploads", "continue", "demo", "downstream", "export", "extending", "failures", "hub_paths", "keyless", "lora", "other_platforms", "page_space", "pages", "prediction", "publish_races", "published_base", "release_bounds", "release_build", "release_faults", "release_flips", "release_hostile", "release_lies", "release_publish", "release_verify", "retract", "sign", "sizes", "terminal_commands", "tutorials", "variants", "wheel", "damaged_home")),
        ["tests", "result"], "Building, signing, publishing, pulling and retracting at length: every request of a publication fails once, a "
        "thousand bytes of a release are flipped, and the tutorials and the demo run whole.",
    ),
}  # fmt: skip


def run_part(name: str, part: Part, only: str | None = None) -> None:
    """only: the step to run, of those that have not finished. Raises SystemExit if there is no such step."""
    if only not in (None, *part.steps()):
        raise SystemExit(f"soak: part {name} has no step {only}; it has {', '.join(part.steps())}")
    record, present = RECORDS / f"{name}.jsonl", processes.commit()
    record.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    finished = {line["step"]: line for line in lines if line["commit"] == present}
    for number, (step, function) in enumerate(part.steps().items(), start=1):
        if step in finished or only not in (None, step):
            continue
        print(f"{name}: step {number} of {len(part.steps())}, {step}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            cells = function(Path(folder))
        finished[step] = {"step": step, "commit": present, "cells": cells, "minutes": (time.monotonic() - began) / 60}
        with record.open("a") as file:
            file.write(json.dumps(finished[step]) + "\n")
    write_section(name, part, present, finished)


def write_section(name: str, part: Part, present: str, finished: dict[str, dict]) -> None:
    minutes = sum(line["minutes"] for line in finished.values())
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {present}, {minutes:.0f} minutes: Python {platform.python_version()}, torch "
        f"{version('torch')}, megatron-core {version('megatron-core')}, {platform.machine()}."
    )
    if missing := [step for step in part.steps() if step not in finished]:
        about += f" Not run: {', '.join(missing)}."
    rows = [f"| {' | '.join([step, *finished[step]['cells']])} |" for step in part.steps() if step in finished]
    table = [f"| {' | '.join(part.head)} |", "|---" * len(part.head) + "|", *rows]
    section = "\n".join([f"## {name}", "", about, "", part.about, "", *table, ""])
    written = REPORT.read_text() if REPORT.exists() else ""
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", written, re.MULTILINE | re.DOTALL))
    sections = {title: f"## {title}\n{text.rstrip()}\n" for title, text in sections.items()} | {name: section}
    REPORT.write_text("\n".join([HEAD, *(sections[title] for title in PARTS if title in sections)]))
    print(section)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("step", nargs="?")
    arguments = parser.parse_args()
    name = arguments.part
    if name is None:
        print("\n".join(f"{name:<16} {part.about}" for name, part in PARTS.items()))
        return 0
    if (environment := PARTS[name].environment) and Path(sys.prefix) != ROOT / environment:
        subprocess.run(["make", f"{environment}/.ready"], cwd=ROOT, check=True)
        python = str(ROOT / environment / "bin/python")
        os.execv(python, [python, "-m", "tests.soak", name, *filter(None, [arguments.step])])
    run_part(name, PARTS[name], arguments.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
