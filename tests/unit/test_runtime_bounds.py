"""Which variants a program is asked to run, and what is allowed of its differences."""

from __future__ import annotations

from typing import Any

import pytest

from release.facts import runtimes
from stages.export.variants.registry import VARIANTS, VariantName

MOE, DENSE = {"head_dim": 64, "num_experts": 8}, {"head_dim": 64}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 8}


@pytest.mark.parametrize(
    ("name", "config", "amx", "lack"),
    [
        ("int8", MOE, False, "INT8 experts for x86 processors need AMX"),
        ("int8", MOE, True, ""),
        ("int8", DENSE, False, ""),
        ("fp8", MOE, True, "a scale for each block of 128 weights"),
        ("fp8", DENSE, False, ""),
        ("fp8-attention", MOE, False, ""),
        ("bf16", {**MOE, "head_dim": 16}, True, "heads of 32 and larger"),
        ("bf16", LATENT, True, ""),
        ("bf16", {**LATENT, "kv_lora_rank": 32}, True, "latents of 512 + 64, and these are 32 + 64"),
        ("int8", LATENT, False, "INT8 experts for x86 processors need AMX"),
    ],
)
def test_what_vllm_lacks_on_a_cpu(
    name: VariantName, config: dict[str, Any], amx: bool, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "_has_amx", lambda: amx)
    stated = runtimes.RUNTIMES["vLLM"].lack(VARIANTS[name], config)
    assert lack in stated and bool(stated) == bool(lack)
