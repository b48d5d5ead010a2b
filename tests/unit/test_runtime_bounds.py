"""Which variants a program is asked to run, and what is allowed of its differences."""

from __future__ import annotations

from typing import Any

import pytest

from release.facts import runtimes
from stages.export.variants.registry import VARIANTS, VariantName

MOE, DENSE = {"head_dim": 64, "num_experts": 8}, {"head_dim": 64}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 8}


@pytest.mark.parametrize(
    ("name", "config", "lack"),
    [
        ("fp8", MOE, "a scale for each block of 128 weights"),
        ("fp8", DENSE, ""),
        ("bf16", {**MOE, "head_dim": 16}, "heads of 32 and larger"),
        ("bf16", LATENT, ""),
        ("bf16", {**LATENT, "kv_lora_rank": 32}, "latents of 512 + 64, and these are 32 + 64"),
        ("fp8", LATENT, "a scale for each block of 128 weights"),
    ],
)
def test_what_vllm_lacks_on_a_cpu(name: VariantName, config: dict[str, Any], lack: str) -> None:
    stated = runtimes.RUNTIMES["vLLM"].lack(VARIANTS[name], config)
    assert lack in stated and bool(stated) == bool(lack)
