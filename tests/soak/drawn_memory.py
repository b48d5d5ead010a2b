"""The part of the soak about memory: ranks of models and layouts drawn at random, simulated, against the plan."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core.errors import RecipeError
from stages.train import rank_simulation
from stages.train.config import SftConfig
from tests.fixtures import train_fixtures
from tests.soak.layouts import Cells, Step
from tests.soak.simulated_ranks import TOLERANCE

HEAD = ["draws", "largest peak, GiB", "median difference", "largest difference"]
STEPS, DRAWS = 4, 10


def steps() -> dict[str, Step]:
    """A row for each DRAWS of seeds."""
    return {f"seeds {n * DRAWS} to {(n + 1) * DRAWS - 1}": partial(compare, n * DRAWS) for n in range(STEPS)}


def compare(first: int, folder: Path) -> Cells:
    """Raises SystemExit if the plan of a draw has other parameters, or is off by more than TOLERANCE."""
    differences, peaks = [], []
    for seed in range(first, first + DRAWS):
        config, rank = draw(seed)
        result = rank_simulation.simulate(config, rank)
        difference = result.planned_peak_bytes / result.peak_bytes - 1
        if abs(difference) > TOLERANCE or result.parameters != result.planned_parameters:
            raise SystemExit(f"soak: draw {seed}, rank {rank}: {difference:+.1%} of {result.peak_bytes}; {config}")
        differences.append(abs(difference))
        peaks.append(result.peak_bytes)
    largest, middle = max(differences), sorted(differences)[DRAWS // 2]
    return [str(DRAWS), f"{max(peaks) / 2**30:.1f}", f"{middle:.1%}", f"{largest:.1%}"]


def draw(seed: int) -> tuple[SftConfig, int]:
    """A possible phase, and one of its ranks."""
    chance = random.Random(seed)
    while True:
        phase = drawn_phase(chance)
        settings = {"model": drawn_model(chance), "phase": phase, "seed": 0}
        settings["padded_vocab_size"] = chance.choice([4096, 8192, 32768, 65536, 151936])
        try:
            return SftConfig.model_validate(settings), chance.choice([0, phase["parallelism"]["ranks"] - 1])
        except (ValidationError, RecipeError):
            continue


def drawn_model(chance: random.Random) -> dict[str, Any]:
    architecture, kv_heads = chance.choice(list(KINDS)), chance.choice([1, 2, 4, 8])
    hidden = chance.choice([256, 512, 768, 1024, 1536])
    model = {
        "architecture": architecture, "layers": chance.choice([2, 3, 4, 6, 8]), "hidden_size": hidden,
        "context_length": 8192, "tie_embeddings": architecture in ("qwen3", "qwen3_moe", "deepseek_v3")
        and chance.random() < 0.4,
    }  # fmt: skip
    if architecture != "deepseek_v3":
        heads = kv_heads * chance.choice([1, 2, 4, 8])
        model |= {"heads": heads, "kv_heads": kv_heads, "head_dim": chance.choice([32, 64, 128])}
    if architecture != "qwen3":
        model |= {"experts": chance.choice([4, 8, 16, 32, 64]), "num_experts_per_tok": chance.choice([2, 3, 4, 6])}
        model |= {"moe_intermediate_size": chance.choice([128, 256, 512, 1024])}
    if architecture in ("qwen3_moe", "deepseek_v3") and chance.random() < 0.3:
        model |= {"dense_layers": 1, "intermediate_size": 2 * hidden}
    return model | {name: chance.choice(values) for name, values in KINDS[architecture].items()}


KINDS: dict[str, dict[str, list[Any]]] = {
    "qwen3": {"intermediate_size": [512, 1024, 2048, 4096]},
    "qwen3_moe": {"shared_expert_intermediate_size": [None, 256, 1024], "z_loss": [0.0, 1e-3]},
    "deepseek_v3": {
        "heads": [4, 8, 16], "q_lora_rank": [None, 256, 384], "kv_lora_rank": [128, 256], "v_head_dim": [32, 64, 128],
        "qk_nope_head_dim": [32, 64, 128], "qk_rope_head_dim": [16, 32, 64], "n_shared_experts": [1, 2],
        "balance": ["batch", "sequence"],
    },
    "gpt_oss": {"sliding_window": [64, 128, 200, 512]},
    "qwen3_next": {
        "shared_expert_intermediate_size": [128, 256, 512], "full_attention_interval": [1, 2, 3, 4],
        "partial_rotary_factor": [0.25, 0.5, 1.0], "linear_num_key_heads": [2, 4], "linear_num_value_heads": [4, 8, 16],
        "linear_key_head_dim": [32, 64, 128], "linear_value_head_dim": [32, 64, 128],
    },
}  # fmt: skip
"""The settings of each architecture that are its alone, with values to choose from."""


def drawn_phase(chance: random.Random) -> dict[str, Any]:
    layout = {
        "tp": chance.choice([1, 1, 2, 4, 8]), "pp": chance.choice([1, 1, 2, 3, 4]), "cp": chance.choice([1, 1, 2, 4]),
        "vpp": chance.choice([1, 1, 2]), "ep": chance.choice([1, 2, 4, 8, 16]), "etp": chance.choice([None, 1, 2]),
        "dispatcher": chance.choice(["alltoall", "alltoall", "allgather"]),
        "recompute": chance.choice(["none", "none", "layer"]), "overlap_gradients": chance.choice([None, True, False]),
    }  # fmt: skip
    data = chance.choice([1, 2, 3, 4, 8, 32])
    layout["ranks"] = layout["tp"] * layout["pp"] * layout["cp"] * data
    row = chance.choice([256, 512, 768, 1000, 1024, 2048, 3072, 4096, 8192])
    micro = row * chance.choice([1, 1, 2, 4])
    phase = {
        **train_fixtures.PHASE, "sequence_length": row, "pack": chance.random() < 0.5, "parallelism": layout,
        "precision": chance.choice(["bf16", "bf16", "bf16", "fp32"]),
        "batch": {"micro_tokens": micro, "global_tokens": micro * data * chance.choice([1, 2, 3, 4, 8])},
    }  # fmt: skip
    if chance.random() < 0.2:
        targets = chance.choice([["attention"], ["mlp"], ["attention", "mlp"]])
        phase["lora"] = {"rank": chance.choice([4, 16, 64]), "alpha": 16, "targets": targets}
    elif chance.random() < 0.1:
        phase["weight_format"] = "mxfp4"
    return phase
