"""Published runs (anchors.csv), and what the formulas need of their models and systems.

Dimensions are those that each model's authors published, figures of systems those of their maker. Rows are NVIDIA's,
from Megatron-Bridge (github.com/NVIDIA-NeMo/Megatron-Bridge at commit 067f987, in the file of the last column); those
of releases 24.12 to 25.04 from pages of NeMo (docs.nvidia.com/nemo-framework/). The column run:

- tuned: of tables and verification cards, with mock data and even routing;
- real data: of cards, with natural routing, and packed rows if the length is not 4,096; not tuned;
- host: runs in which the GPU waits for the host, of which two constants follow (bench/throughput.py);
- held out: other tables and studies, with mock data. No constant is fitted to them; the form of the host's term was
  chosen while their errors were seen, except those of NeMo: these were computed once, after all else.

The columns from global_batch to graphs are the recipe of each run: empty for one that the formulas do not describe
(fully sharded data parallelism) or whose table does not tell. Dispatcher, overlap and graphs of the tables are those of
the recipes of that commit, or of another system in the same release; of releases before 26.06 they are not known. No
tflops: another count of attention, or none published. Where a range of step times is published, the row is its middle.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.stage import Accelerator
from pipeline.launch import cluster_profile
from stages.mcore.throughput import LayerShape, Shape, shape_of
from stages.models.base import AttentionCost
from stages.models.deepseek_v3 import DeepseekV3Config
from stages.models.grouped_query import Qwen3Config
from stages.models.mixture import Glm4MoeConfig, Qwen3MoeConfig

QWEN3 = dict(kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8, context_length=4096, tie_embeddings=False)
QWEN3_30B = Qwen3MoeConfig(layers=48, hidden_size=2048, heads=32, moe_intermediate_size=768, **QWEN3)
QWEN3_235B = Qwen3MoeConfig(layers=94, hidden_size=4096, heads=64, moe_intermediate_size=1536, **QWEN3)
QWEN3_VOCABULARY = 151_936
LATENT = dict(
    architecture="deepseek_v3", layers=61, hidden_size=7168, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, num_experts_per_tok=8, moe_intermediate_size=2048, intermediate_size=18432,
    context_length=4096, tie_embeddings=False,
)  # fmt: skip
DEEPSEEK_V3 = DeepseekV3Config(
    **LATENT, heads=128, experts=256, n_group=8, topk_group=4, dense_layers=3, routed_scaling_factor=2.5
)
"""arXiv:2412.19437, section 4.2."""
KIMI_K2 = DeepseekV3Config(**LATENT, heads=64, experts=384, dense_layers=1, routed_scaling_factor=2.827)
"""arXiv:2507.20534."""
MOONLIGHT = DeepseekV3Config(**LATENT | dict(
    layers=27, hidden_size=2048, heads=16, q_lora_rank=None, experts=64, num_experts_per_tok=6, n_shared_experts=2,
    moe_intermediate_size=1408, dense_layers=1, intermediate_size=11264, routed_scaling_factor=2.446,
))  # fmt: skip
"""arXiv:2502.16982."""
DEEPSEEK_VOCABULARY, MOONSHOT_VOCABULARY = 129_280, 163_840
GLM_45 = Glm4MoeConfig(
    architecture="glm4_moe", layers=92, hidden_size=5120, heads=96, kv_heads=8, head_dim=128, use_qk_norm=True,
    experts=160, num_experts_per_tok=8, moe_intermediate_size=1536, dense_layers=3, intermediate_size=12288,
    routed_scaling_factor=2.5, context_length=131_072, rope_theta=1e6, norm_eps=1e-5,
)  # fmt: skip
GLM_45_AIR = GLM_45.model_copy(update=dict(
    layers=46, hidden_size=4096, use_qk_norm=False, experts=128, moe_intermediate_size=1408, dense_layers=1,
    intermediate_size=10944, routed_scaling_factor=1.0,
))  # fmt: skip
"""arXiv:2508.06471, table 1, and config.json of later models of the same shapes."""
GLM_VOCABULARY = 151_552


def dense(layers: int, hidden: int, heads: int, ffn: int, kv_heads: int = 8, vocabulary: int = 128_256) -> Shape:
    """Llama 2 (arXiv:2307.09288) and 3 (arXiv:2407.21783, table 3), SmolLM3 and Qwen3 8B (arXiv:2505.09388), which are
    built alike: heads of 128."""
    model = Qwen3Config(
        architecture="qwen3", layers=layers, hidden_size=hidden, heads=heads, kv_heads=kv_heads, head_dim=128,
        intermediate_size=ffn, context_length=4096, tie_embeddings=False,
    )  # fmt: skip
    return shape_of(model, vocabulary)


MIXTRAL_8X7B = Qwen3MoeConfig(
    layers=32, hidden_size=4096, heads=32, kv_heads=8, head_dim=128, experts=8, num_experts_per_tok=2,
    moe_intermediate_size=14336, context_length=4096, tie_embeddings=False,
)  # fmt: skip
"""arXiv:2401.04088, table 1."""


def latent(model: DeepseekV3Config, vocabulary: int, mtp: int = 0) -> Shape:
    """A module of multi-token prediction is a layer, the projection that joins two states, and the head again."""
    shape = shape_of(model, vocabulary)
    module = replace(shape.layers[-1], layers=mtp, dense=shape.layers[-1].dense + 2 * model.hidden_size**2)
    attention = replace(shape.attention, layers=shape.attention.layers + mtp)
    return replace(shape, layers=(*shape.layers, module), attention=attention, heads=1 + mtp)


@dataclass(frozen=True)
class Windowed(AttentionCost):
    """Layers of which every second one sees a window of the latest tokens only."""

    window: int = 128

    def keys(self, sequence_length: int) -> float:
        """The mean of min(position, window) over a row of n tokens is w - w^2 / 2n."""
        window = min(self.window, sequence_length)
        return (super().keys(sequence_length) + window - window * window / (2 * sequence_length)) / 2


def gpt_oss(layers: int, experts: int, vocabulary: int) -> Shape:
    """arXiv:2508.10925, which this project does not build; both were also trained with a vocabulary of 32,000, that of
    the data's tokenizer: (32K). Biases of all matrices are among the parameters."""
    hidden, heads, kv_heads, head = 2880, 64, 8, 64
    attention = 2 * hidden * head * (heads + kv_heads) + head * (heads + 2 * kv_heads) + heads + 3 * hidden
    expert = 3 * hidden * hidden + 3 * hidden
    saved = 143_104 + 13 * experts  # what Megatron's layer keeps: 1 + 4 copies of a token, and the router's scores
    layer = LayerShape(1, attention + experts * (hidden + 1), experts * expert, saved, 161_280)
    cost = Windowed(layers, heads, head, head)
    return Shape(hidden, vocabulary, (layer,) * layers, cost, experts, top_k=4)


def counted_before(shape: Shape) -> Shape:
    """Before release 26.06 the tables counted two of an expert's three matrices of GPT-OSS, and all layers as full
    ones."""
    layers = tuple(replace(layer, experts=layer.experts * 2 // 3) for layer in shape.layers)
    a = shape.attention
    return replace(shape, layers=layers, attention=AttentionCost(a.layers, a.heads, a.qk, a.v))


MODELS = {
    "SmolLM3 3B": dense(36, 2048, 16, 11008, kv_heads=4),
    "Qwen3 8B": dense(36, 4096, 32, 12288, vocabulary=QWEN3_VOCABULARY),
    "Llama 2 7B": dense(32, 4096, 32, 11008, kv_heads=32, vocabulary=32_000),
    "Llama 2 13B": dense(40, 5120, 40, 13824, kv_heads=40, vocabulary=32_000),
    "Llama 2 70B": dense(80, 8192, 64, 28672, vocabulary=32_000),
    "Llama 3 8B": dense(32, 4096, 32, 14336),
    "Llama 3 70B": dense(80, 8192, 64, 28672),
    "Llama 3.1 405B": dense(126, 16384, 128, 53248),
    "DeepSeek-V3 without MTP": latent(DEEPSEEK_V3, DEEPSEEK_VOCABULARY),
    "DeepSeek-V3": latent(DEEPSEEK_V3, DEEPSEEK_VOCABULARY, mtp=1),
    "Kimi K2": latent(KIMI_K2, MOONSHOT_VOCABULARY),
    "Moonlight 16B-A3B": latent(MOONLIGHT, MOONSHOT_VOCABULARY),
    "Mixtral 8x7B": shape_of(MIXTRAL_8X7B, 32_000),
    "Qwen3-30B-A3B": shape_of(QWEN3_30B, QWEN3_VOCABULARY),
    "Qwen3-235B-A22B": shape_of(QWEN3_235B, QWEN3_VOCABULARY),
    "GPT-OSS 120B": gpt_oss(36, 128, 201_088),
    "GPT-OSS 120B (32K)": gpt_oss(36, 128, 32_000),
    "GPT-OSS 20B": gpt_oss(24, 32, 201_088),
    "GPT-OSS 20B (32K)": gpt_oss(24, 32, 32_000),
    "GPT-OSS 120B as counted before 26.06": counted_before(gpt_oss(36, 128, 201_088)),
}


def _blackwell(bf16: float, fp4: float, domain: int, network: float, watts: int) -> Accelerator:
    """HBM3e of 8 TB/s and NVLink 5 of 900 GB/s in one direction; FP8 has twice the rate of bf16."""
    peaks = {"bf16": bf16 * 1e12, "fp8": 2 * bf16 * 1e12, "fp4": fp4 * 1e12}
    return Accelerator(peaks, 8e12, 900e9, domain, network, watts)


def systems() -> dict[str, Accelerator]:
    """Peaks without sparsity. B300: HGX B300, 4.5 PFLOP/s in FP8, 1.6 TB/s of network for 8 GPUs both ways
    (nvidia.com/data-center/hgx). B200: DGX B200, 72 PFLOP/s in FP8 and 144 in FP4 with sparsity for 8 GPUs, one
    ConnectX-7 of 400 Gb/s each (nvidia.com/data-center/dgx-b200). GB200: NVL72, 720 PFLOP/s in FP8 with sparsity for 72
    GPUs, one ConnectX-7 of 400 Gb/s each (nvidia.com/data-center/gb200-nvl72). GB300: NVL72, the same with ConnectX-8
    of 800 Gb/s (nvidia.com/data-center/gb300-nvl72). FP4: GB200 1,440 PFLOP/s with sparsity for 72 GPUs; GB300 and
    B300, and power: verda.com/blog/gb300-nvl72-architecture. H100: as the profile h100-pyxis states it."""
    h100 = cluster_profile.load("h100-pyxis").accelerator
    assert h100 is not None
    return {
        "H100": h100,
        "B300": _blackwell(2250, 14000, 8, 100e9, 1100),
        "B200": _blackwell(2250, 9000, 8, 50e9, 1000),
        "GB200": _blackwell(2500, 10000, 72, 50e9, 1200),
        "GB300": _blackwell(2500, 15000, 72, 100e9, 1400),
    }


def anchors() -> Iterator[dict[str, str]]:
    with open(Path(__file__).with_name("anchors.csv"), newline="") as file:
        yield from csv.DictReader(file)
