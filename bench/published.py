"""Published runs (anchors.csv), and what the formulas need of their models and systems.

Dimensions are those that each model's authors published, figures of systems those of their maker. Rows are NVIDIA's,
from Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge, in the file of the last column): tables of tuned runs with
mock data and even routing, and verification cards, of which a few ran on real data with natural routing. The columns
from global_batch to graphs are the recipe of each run: empty for one that the formulas do not describe (fully sharded
data parallelism) or whose table does not tell.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.core.stage import Accelerator
from pipeline.launch import cluster_profile
from stages.mcore.throughput import LayerShape, Shape, shape_of
from stages.models.costs import AttentionCost
from stages.models.gpt_oss.config import GptOssConfig
from stages.models.qwen3.config import Qwen3Config
from stages.models.qwen3_moe.config import Qwen3MoeConfig

QWEN3 = dict(kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8, context_length=4096, tie_embeddings=False)
QWEN3_30B = Qwen3MoeConfig(layers=48, hidden_size=2048, heads=32, moe_intermediate_size=768, **QWEN3)
QWEN3_235B = Qwen3MoeConfig(layers=94, hidden_size=4096, heads=64, moe_intermediate_size=1536, **QWEN3)
QWEN3_VOCABULARY = 151_936


def dense(layers: int, hidden: int, heads: int, ffn: int, kv_heads: int = 8, vocabulary: int = 128_256) -> Shape:
    """Llama 3 (arXiv:2407.21783, table 3), SmolLM3 and Qwen3 8B (arXiv:2505.09388), which are built alike: heads of
    128."""
    model = Qwen3Config(
        architecture="qwen3", layers=layers, hidden_size=hidden, heads=heads, kv_heads=kv_heads, head_dim=128,
        intermediate_size=ffn, context_length=4096, tie_embeddings=False,
    )  # fmt: skip
    return shape_of(model, vocabulary)


def latent(
    layers: int, heads: int, experts: int, vocabulary: int, hidden: int = 7168, queries: int = 1536, dense: int = 1,
    ffn: int = 18432, width: int = 2048, top_k: int = 8, shared: int = 1, mtp: int = 0,
) -> Shape:  # fmt: skip
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2), Kimi K2 (arXiv:2507.20534) and Moonlight (arXiv:2502.16982):
    multi-head latent attention with latents of `queries` (0: none) for queries and 512 for keys and values, heads of
    128 and 64 rotary dimensions. A module of multi-token prediction is a layer, the projection that joins two states,
    and the head again."""
    qk, v, keys = 128 + 64, 128, 512
    q = hidden * queries + queries * heads * qk if queries else hidden * heads * qk
    attention = q + hidden * (keys + 64) + keys * heads * (128 + v) + heads * v * hidden
    kept = 2 * (4 * hidden + 2 * (queries + keys) + 64 + heads * (2 * qk + 2 * v)) + 4 * heads
    swiglu, sent = 6 * width, 2 * hidden * top_k
    sparse = LayerShape(
        layers - dense, attention + hidden * experts + shared * 3 * hidden * width, experts * 3 * hidden * width,
        kept + 13 * experts + sent + swiglu * (top_k + shared), 4 * sent,
    )  # fmt: skip
    first = LayerShape(dense, attention + 3 * hidden * ffn, 0, kept + 6 * ffn, 0)
    module = replace(sparse, layers=mtp, dense=sparse.dense + 2 * hidden * hidden)
    return Shape(hidden, vocabulary, (first, sparse, module), (AttentionCost(layers + mtp, heads, qk, v),),
                 experts, top_k, heads=1 + mtp)  # fmt: skip


GPT_OSS_120B = GptOssConfig(
    architecture="gpt_oss", layers=36, hidden_size=2880, heads=64, kv_heads=8, head_dim=64, experts=128,
    num_experts_per_tok=4, moe_intermediate_size=2880, sliding_window=128, context_length=4096,
)  # fmt: skip
"""arXiv:2508.10925."""


def counted_before(shape: Shape) -> Shape:
    """Before release 26.06 the tables counted two of an expert's three matrices of GPT-OSS, and all layers as full
    ones."""
    layers = tuple(replace(layer, experts=layer.experts * 2 // 3) for layer in shape.layers)
    return replace(shape, layers=layers, attention=tuple(replace(a, window=None) for a in shape.attention))


MODELS = {
    "SmolLM3 3B": dense(36, 2048, 16, 11008, kv_heads=4),
    "Qwen3 8B": dense(36, 4096, 32, 12288, vocabulary=QWEN3_VOCABULARY),
    "Llama 3 8B": dense(32, 4096, 32, 14336),
    "Llama 3 70B": dense(80, 8192, 64, 28672),
    "Llama 3.1 405B": dense(126, 16384, 128, 53248),
    "DeepSeek-V3 without MTP": latent(61, 128, 256, 129_280, dense=3),
    "DeepSeek-V3": latent(61, 128, 256, 129_280, dense=3, mtp=1),
    "Kimi K2": latent(61, 64, 384, 163_840),
    "Moonlight 16B-A3B": latent(27, 16, 64, 163_840, 2048, 0, ffn=11264, width=1408, top_k=6, shared=2),
    "Qwen3-30B-A3B": shape_of(QWEN3_30B, QWEN3_VOCABULARY),
    "Qwen3-235B-A22B": shape_of(QWEN3_235B, QWEN3_VOCABULARY),
    "GPT-OSS 120B": shape_of(GPT_OSS_120B, 201_088),
    "GPT-OSS 120B as counted before 26.06": counted_before(shape_of(GPT_OSS_120B, 201_088)),
}


def _blackwell(bf16: float, domain: int, network: float, watts: int) -> Accelerator:
    """HBM3e of 8 TB/s and NVLink 5 of 900 GB/s in one direction; FP8 has twice the rate of bf16."""
    return Accelerator({"bf16": bf16 * 1e12, "fp8": 2 * bf16 * 1e12}, 8e12, 900e9, domain, network, watts)


def systems() -> dict[str, Accelerator]:
    """Peaks without sparsity. B300: HGX B300, 4.5 PFLOP/s in FP8, 1.6 TB/s of network for 8 GPUs both ways
    (nvidia.com/data-center/hgx). GB200: NVL72, 720 PFLOP/s in FP8 with sparsity for 72 GPUs, one ConnectX-7 of 400 Gb/s
    each (nvidia.com/data-center/gb200-nvl72). GB300: NVL72, the same with ConnectX-8 of 800 Gb/s
    (nvidia.com/data-center/gb300-nvl72). Power: verda.com/blog/gb300-nvl72-architecture. H100: as the profile
    h100-pyxis states it."""
    h100 = cluster_profile.load("h100-pyxis").accelerator
    assert h100 is not None
    return {
        "H100": h100,
        "B300": _blackwell(2250, 8, 100e9, 1100),
        "GB200": _blackwell(2500, 72, 50e9, 1200),
        "GB300": _blackwell(2500, 72, 100e9, 1400),
    }


def anchors() -> Iterator[dict[str, str]]:
    with open(Path(__file__).with_name("anchors.csv"), newline="") as file:
        yield from csv.DictReader(file)
