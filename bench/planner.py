"""The planner's formulas against published figures: FLOPs of a token, state and peak memory, throughput, GPU hours of
whole runs.

    .venv/bin/python bench/planner.py            # some ten seconds of arithmetic

FLOPs: `anchors.csv` holds TFLOP/s and tokens/s of one GPU that NVIDIA published (bench/published.py), whose quotient is
a constant of the model. We compute it from the dimensions that each model's authors published, by the function that
`atom plan` uses; nothing is fitted. What is left is mostly the router, which we count and those tables do not. The last
line is one JSON object, whose `ratio` is the largest error: below its target is good.

Throughput: bench/throughput.py fits the model of `atom plan --cluster` and prints its errors on runs that were fitted
and on runs that were left out.

Not compared: models whose layers these formulas do not describe (Mamba of the Nemotron 3 models, the compressed
attention of DeepSeek-V4).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import throughput
from bench.published import MODELS, QWEN3_30B, QWEN3_VOCABULARY, anchors, systems
from stages.mcore.memory import Activations, memory_share, state_bytes
from stages.mcore.optimizer import Adam
from stages.mcore.throughput import StepSetup, step_time
from stages.models.base import Rows, training_flops
from stages.models.parallel_layout import Layout

TARGET = 0.01


def flops_errors() -> list[float]:
    """Prints GFLOP per token of each anchor, ours and published; gives the relative errors."""
    print(f"{'GFLOP per token':38}{'row':>6}{'ours':>10}{'published':>11}{'error':>9}{'  rounding':10}  of")
    errors = []
    for row in anchors():
        if not row["tflops"]:
            continue
        model, length = MODELS[row["model"]], int(row["sequence_length"])
        ours = training_flops(model.matrices, model.attention, length) / 1e9
        published = 1000 * float(row["tflops"]) / float(row["tokens_per_s"])
        errors.append(ours / published - 1)
        rounding = sum(_half_digit(row[name]) / float(row[name]) for name in ("tflops", "tokens_per_s"))
        print(f"{row['model']:38}{length:6}{ours:10.2f}{published:11.2f}{errors[-1]:9.2%}{rounding:10.2%}"
              f"  {row['system']} {row['precision']}, {row['release']}")  # fmt: skip
    return errors


def _half_digit(text: str) -> float:
    """Half of the last digit that is printed: what rounding may have taken."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def memory() -> None:
    """Prints state and peak memory of Qwen3-30B-A3B on 16 H100, ours and published."""
    layout, gib = Layout(ranks=16, ep=16, fusions=("cross_entropy",)), 2**30  # all logits at once
    part = memory_share(QWEN3_30B, QWEN3_VOCABULARY, layout, 0)
    state = state_bytes(part, layout, "bf16", Adam) / gib
    rows = Rows(1, 4096)
    ours, fused = (
        Activations(QWEN3_30B, QWEN3_VOCABULARY, layout, "bf16", rows, 64, 0, fused=fused).peak() / gib
        for fused in (False, True)
    )
    half = state - 2 * part.all / gib
    peak = 62.17
    print("\nmemory of a GPU, GiB: Qwen3-30B-A3B in bf16 on 16 H100, TP1 PP1 EP16, one row of 4096")
    print(f"{'':62}{'ours':>8}{'published':>11}{'error':>9}")
    for name, value, published in (
        ("state, 18 bytes a parameter where it is not shared", state, 40.0),
        ("peak allocated: our kernels, which keep more of SwiGLU", state + ours, peak),
        ("peak allocated: one kernel for SwiGLU, as in its recipe", state + fused, peak),
        ("the same, gradients in bf16, as its recipe now has it", half + fused, peak),
    ):
        print(f"{name:62}{value:8.2f}{published:11.2f}{value / published - 1:9.1%}")


RUNS = (
    (
        "DeepSeek-V3", 14.8e12, 2_664_000, "arXiv:2412.19437, table 1, pre-training on 2,048 H800",
        # sections 3.2 and 4.2; DualPipe hides the experts' traffic and half of the bubble
        StepSetup(
            Layout(ranks=2048, pp=16, vpp=2, ep=64, dispatcher="flex"), "fp8-blockwise", Rows(1, 4096), 120,
            hides_experts=True,
        ),
    ),
    (
        "SmolLM3 3B", 11.2e12, 384 * 24 * 24, "huggingface.co/blog/smollm3, 24 days of 384 H100",
        # 576 rows a step, which 384 GPUs share only as groups; TP2 is taken
        StepSetup(Layout(ranks=384, tp=2), "bf16", Rows(3, 4096), 1),
    ),
)  # fmt: skip
"""Whole runs: tokens, GPU hours as published, where, and how a step was computed."""


def hours_errors() -> list[float]:
    """Prints GPU hours of whole runs, by the model of `atom plan --cluster` and published; gives the errors."""
    h100 = systems()["H100"]
    machines = {"DeepSeek-V3": replace(h100, nvlink=200e9), "SmolLM3 3B": h100}  # H800: 400 GB/s in both directions
    print(f"\n{'GPU hours of a whole run':38}{'ours':>12}{'published':>12}{'error':>9}  of")
    errors = []
    for name, tokens, published, where, run in RUNS:
        step = run.micro_batches * run.rows.rows * run.rows.length * run.layout.data
        hours = tokens / step * step_time(MODELS[name], machines[name], run).total * run.layout.ranks / 3600
        errors.append(hours / published - 1)
        print(f"{name + ', ' + run.precision:38}{hours:12,.0f}{published:12,}{errors[-1]:9.0%}  {where}")
    return errors


def fp8_on_h100() -> None:
    """Prints whether FP8 has been seen to pay on H100, which is what the recipes go by: the best published figures on
    mock data without hidden traffic, and what the model gives for the same layout in either, without CUDA graphs."""
    print(f"\n{'TFLOP/s of an H100':38}{'bf16':>8}{'fp8':>8}{'fp8 / bf16':>12}{'by the model':>14}")
    by_model: dict[str, dict[str, float]] = {}
    for row in anchors():
        on_mock_data = row["run"] in ("tuned", "held out") and row["overlap"] != "yes" and row["tflops"]
        if row["system"] == "H100" and on_mock_data and "before" not in row["model"]:
            figures = by_model.setdefault(row["model"], {})
            figures[row["precision"]] = max(float(row["tflops"]), figures.get(row["precision"], 0.0))
    tuned = (run for run in throughput.runs() if run.row["system"] == "H100" and run.row["run"] == "tuned")
    described = {run.row["model"]: run for run in tuned}
    for model, figures in by_model.items():
        both = f"{figures['fp8'] / figures['bf16']:12.2f}" if len(figures) == 2 else f"{'unknown':>12}"
        cells = "".join(f"{figures[p]:8.0f}" if p in figures else f"{'-':>8}" for p in ("bf16", "fp8"))
        ours = f"{_fp8_gain(described[model]):14.2f}" if model in described else f"{'-':>14}"
        print(f"{model:38}{cells}{both}{ours}")


def _fp8_gain(anchor: throughput.Anchor) -> float:
    plain = replace(anchor.run, graphs="none", hides_experts=False)
    seconds = [
        step_time(anchor.shape, anchor.gpu, replace(plain, precision=p)).total for p in ("bf16", "fp8-tensorwise")
    ]
    return seconds[0] / seconds[1]


def measure() -> dict[str, Any]:
    errors = [abs(error) for error in flops_errors()]
    memory()
    throughput.report()
    hours_errors()
    fp8_on_h100()
    return {
        "name": "planner",
        "ratio": round(max(errors), 5),
        "low": round(statistics.median(errors), 5),
        "high": round(max(errors), 5),
        "target": TARGET,
        "unit": f"largest relative error of GFLOP per token over {len(errors)} published figures; low: the median one",
        "machine": f"{platform.machine()}, arithmetic only",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same: nothing here takes long")
    parser.parse_args()
    print(json.dumps(measure()))
