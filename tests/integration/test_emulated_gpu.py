"""The code for GPUs, with real values, on an emulated one (tests/fixtures/emulated_gpu.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import glm_fixtures, layout_fixtures, qwen3_next_fixtures, train_fixtures

pytestmark = pytest.mark.numeric

EMULATED = ("tests.fixtures.emulated_gpu",)
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": train_fixtures.MODEL,
    "qwen3": {**{k: v for k, v in train_fixtures.MODEL.items() if "expert" not in k and k not in ("aux_loss", "moe_intermediate_size")}, "architecture": "qwen3", "intermediate_size": 48},
    "glm4_moe": glm_fixtures.MODEL,
    "deepseek_v3": {
        **{k: v for k, v in glm_fixtures.MODEL.items() if k not in ("kv_heads", "head_dim")}, "architecture": "deepseek_v3", "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10},
    "gpt_oss": {**train_fixtures.MODEL, "architecture": "gpt_oss", "sliding_window": 12, "moe_intermediate_size": 24},
    "qwen3_next": qwen3_next_fixtures.MODEL,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return folder


def test_every_architecture_trains_as_on_cpu(corpus: Path, tmp_path: Path) -> None:
    plain, packed = {}, {}
    for name, model in MODELS.items():
        plain[f"{name}, fp32"] = corpus, {**train_fixtures.config(), "model": model}
        packed[f"{name}, bf16, packed"] = corpus / "packed", {**train_fixtures.config(pack=True, precision="bf16"), "model": model}
    expected = layout_fixtures.compare_runs(plain | packed, 1, tmp_path / "cpu.json", 3)
    seen = layout_fixtures.compare_runs(plain | packed, 1, tmp_path / "gpu.json", 3, through=EMULATED)
    for name, curve in seen.items():
        print(name, [x.get("loss") for x in curve], [x.get("loss") for x in expected[name]], [x.get("heldout_loss") for x in (curve[-1],expected[name][-1])])
        for s,(a,b) in enumerate(zip(curve,expected[name])):
            for k in a:
                if k not in ("policy","share") and a[k]!=pytest.approx(b[k],rel=1e-5 if name in plain else 1e-2): print("   DIFF",s,k,a[k],b[k])
