"""The planner's formulas against published figures: FLOPs of a token, state and peak memory, GPU hours of whole runs.

    .venv/bin/python bench/planner.py            # under a second; nothing is run

`anchors.csv` holds figures that NVIDIA published with Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge, in the
files of its last column): TFLOP/s and tokens/s of one GPU, whose quotient is a constant of the model. We compute it
from the dimensions that each model's authors published, by the function that `atom plan` uses; nothing is fitted. What
is left is mostly the router, which we count and those tables do not. The last line is one JSON object, whose `ratio` is
the largest error: below its target is good.

Not compared: models whose layers these formulas do not describe (Mamba of the Nemotron 3 models, the compressed
attention of DeepSeek-V4).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.launch import cluster_profile
from stages.mcore.activations import activation_bytes
from stages.mcore.memory import memory_share, state_bytes
from stages.mcore.parallel_layout import Layout
from stages.models.costs import AttentionCost, Rows, training_flops
from stages.models.qwen3_moe.config import Qwen3MoeConfig

TARGET = 0.01
QWEN3 = dict(kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8, context_length=4096, tie_embeddings=False)
QWEN3_30B = Qwen3MoeConfig(layers=48, hidden_size=2048, heads=32, moe_intermediate_size=768, **QWEN3)
QWEN3_235B = Qwen3MoeConfig(layers=94, hidden_size=4096, heads=64, moe_intermediate_size=1536, **QWEN3)
QWEN3_VOCABULARY = 151_936

RUNS = (
    ("DeepSeek-V3", "fp8", 14.8e12, 2_664_000, "arXiv:2412.19437, table 1, pre-training on H800"),
    ("SmolLM3 3B", "bf16", 11.2e12, 384 * 24 * 24, "huggingface.co/blog/smollm3, 24 days of 384 H100"),
)
"""Whole runs on rows of 4,096: precision, tokens, GPU hours as published, and where."""


@dataclass(frozen=True)
class Model:
    """What the formula needs: matrix parameters that a token meets, output head included, and its attention."""

    matrices: int
    attention: tuple[AttentionCost, ...]


def qwen3(model: Qwen3MoeConfig) -> Model:
    return Model(
        model.matrices(QWEN3_VOCABULARY), (AttentionCost(model.layers, model.heads, model.head_dim, model.head_dim),)
    )


def llama(layers: int, hidden: int, heads: int, ffn: int, kv_heads: int = 8) -> Model:
    """Llama 3 (arXiv:2407.21783, table 3), and SmolLM3, which is built alike: heads of 128, 128,256 tokens."""
    layer = 2 * hidden * 128 * (heads + kv_heads) + 3 * hidden * ffn
    return Model(layers * layer + 128_256 * hidden, (AttentionCost(layers, heads, 128, 128),))


def deepseek(layers: int, dense: int, heads: int, experts: int, vocabulary: int, mtp: int = 0) -> Model:
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2) and Kimi K2 (arXiv:2507.20534), which share these widths:
    latents of 1536 for queries and 512 for keys and values, heads of 128 and 64 rotary dimensions, 8 experts of 2048
    and a shared one. Each module of multi-token prediction is a layer, the projection that joins two states, and the
    head again."""
    hidden, qk, v = 7168, 128 + 64, 128
    attention = hidden * (1536 + 512 + 64) + 1536 * heads * qk + 512 * heads * (128 + v) + heads * v * hidden
    sparse = attention + hidden * experts + (8 + 1) * 3 * hidden * 2048
    matrices = layers * attention + dense * 3 * hidden * 18432 + (layers - dense) * (sparse - attention)
    matrices += mtp * (sparse + 2 * hidden * hidden + vocabulary * hidden) + vocabulary * hidden
    return Model(matrices, (AttentionCost(layers + mtp, heads, qk, v),))


def gpt_oss(expert_matrices: int = 3, window: int | None = 128) -> Model:
    """GPT-OSS 120B (arXiv:2508.10925): every other layer sees 128 tokens. Before release 26.06
    the tables counted two of an expert's three matrices, and all layers as full ones."""
    hidden, heads, layers = 2880, 64, 36
    layer = hidden * 64 * (2 * heads + 2 * 8) + hidden * 128 + 4 * expert_matrices * hidden * 2880
    full, local = AttentionCost(layers // 2, heads, 64, 64), AttentionCost(layers // 2, heads, 64, 64, window)
    return Model(layers * layer + 201_088 * hidden, (full, local))


MODELS = {
    "SmolLM3 3B": llama(36, 2048, 16, 11008, kv_heads=4),
    "Llama 3 8B": llama(32, 4096, 32, 14336),
    "Llama 3 70B": llama(80, 8192, 64, 28672),
    "Llama 3.1 405B": llama(126, 16384, 128, 53248),
    "DeepSeek-V3 without MTP": deepseek(61, 3, 128, 256, 129_280),
    "DeepSeek-V3": deepseek(61, 3, 128, 256, 129_280, mtp=1),
    "Kimi K2": deepseek(61, 1, 64, 384, 163_840),
    "Qwen3-30B-A3B": qwen3(QWEN3_30B),
    "Qwen3-235B-A22B": qwen3(QWEN3_235B),
    "GPT-OSS 120B": gpt_oss(),
    "GPT-OSS 120B as counted before 26.06": gpt_oss(expert_matrices=2, window=None),
}


def anchors() -> Iterator[dict[str, str]]:
    with open(Path(__file__).with_name("anchors.csv"), newline="") as file:
        yield from csv.DictReader(file)


def flops_errors() -> list[float]:
    """Prints GFLOP per token of each anchor, ours and published; gives the relative errors."""
    print(f"{'GFLOP per token':38}{'row':>6}{'ours':>10}{'published':>11}{'error':>9}{'  rounding':10}  of")
    errors = []
    for row in anchors():
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
    state = state_bytes(part, layout, "bf16") / gib
    rows = Rows(1, 4096)
    ours, fused = (
        activation_bytes(QWEN3_30B, QWEN3_VOCABULARY, layout, "bf16", rows, 64, 0, fused=fused) / gib
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


def hours_errors() -> list[float]:
    """Prints GPU hours of whole runs, by the rates of the profile h100-pyxis and published; gives the errors."""
    gpu = cluster_profile.load("h100-pyxis").gpu
    assert gpu is not None
    print(f"\n{'GPU hours of a whole run':38}{'ours':>12}{'published':>12}{'error':>9}{'of peak':>9}  of")
    errors = []
    for name, precision, tokens, published, where in RUNS:
        rate, model = gpu.rate(precision), MODELS[name]
        assert rate is not None
        flops = tokens * training_flops(model.matrices, model.attention, 4096)
        ours, reached = flops / rate.flops / 3600, flops / published / 3600 / rate.peak_tflops / 1e12
        errors.append(ours / published - 1)
        print(f"{name + ', ' + precision:38}{ours:12,.0f}{published:12,}{errors[-1]:9.0%}{reached:9.1%}  {where}")
    return errors


def fp8_on_h100() -> None:
    """Prints whether FP8 has been seen to pay on H100, which is what the recipes go by."""
    print(f"\n{'TFLOP/s of an H100':38}{'bf16':>8}{'fp8':>8}{'fp8 / bf16':>12}")
    by_model: dict[str, dict[str, float]] = {}
    for row in anchors():
        if row["system"] == "H100" and "before" not in row["model"]:
            by_model.setdefault(row["model"], {})[row["precision"]] = float(row["tflops"])
    for model, figures in by_model.items():
        both = f"{figures['fp8'] / figures['bf16']:12.2f}" if len(figures) == 2 else f"{'unknown':>12}"
        cells = "".join(f"{figures[p]:8.0f}" if p in figures else f"{'-':>8}" for p in ("bf16", "fp8"))
        print(f"{model:38}{cells}{both}")


def measure() -> dict[str, Any]:
    errors = [abs(error) for error in flops_errors()]
    memory()
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
