"""Megatron-Bridge loads what we export: the way of a model into NeMo (docs/users.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fixtures import glm_fixtures, layout_fixtures, train_fixtures
from tests.te.conftest import Spawn

DENSE: dict[str, Any] = {
    **{k: v for k, v in train_fixtures.MODEL.items() if "expert" not in k and k not in ("aux_loss", "moe_intermediate_size")},
    "architecture": "qwen3", "intermediate_size": 48,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {}
for architecture, section in (("qwen3_moe", train_fixtures.MODEL), ("qwen3", DENSE)):
    untied = {**section, "layers": 3, "tie_embeddings": False, "rope_theta": 1e6}
    MODELS[f"{architecture} tied"] = {**section, "tie_embeddings": True}
    MODELS[f"{architecture} untied"] = untied
    MODELS[f"{architecture} untied, YaRN"] = {**untied, "yarn": {"factor": 4.0, "original_length": 16}}
MODELS["glm4_moe"] = glm_fixtures.MODEL
MODELS["deepseek_v3"] = {
    **{k: v for k, v in glm_fixtures.MODEL.items() if k not in ("kv_heads", "head_dim")}, "architecture": "deepseek_v3",
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10,
    "tie_embeddings": False,
}  # fmt: skip
MODELS["gpt_oss"] = {
    **train_fixtures.MODEL, "architecture": "gpt_oss", "sliding_window": 12, "tie_embeddings": False,
    "moe_intermediate_size": 24,
}  # fmt: skip
"""All but qwen3_next, of which this project has no layers of Transformer Engine to compare with. The bridge guesses
the order of an expert's matrices of gpt_oss by their shapes, and reads one with equal sides wrong."""
IGNORED = {**train_fixtures.MODEL, "dense_layers": 1, "intermediate_size": 48}
"""A model whose first layer has no experts, which the bridge does not notice."""


def test_the_bridge_loads_every_architecture(tmp_path: Path, device: Spawn) -> None:
    """Equal tensors, equal logits, and the same file when the bridge writes it again. Not the logits of gpt_oss, which
    differ here (docs/users.md)."""
    device("hopper")
    codes, logs = layout_fixtures.end(
        layout_fixtures.spawn("tests.te.bridge", [json.dumps({**MODELS, "ignored": IGNORED}), str(tmp_path)], 1),
        timeout=500,
    )
    assert codes == [0], logs[0][-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    # as docs/users.md says: experts without weights in a layer that has none
    assert report.pop("ignored")["different"] and set(report) == set(MODELS)
    for name, comparison in report.items():
        lists = ("different", "unexpected", "written back differently", "written back in addition")
        assert not any(comparison[key] for key in lists), (name, comparison)
        bound = 1e-6 * comparison["largest"]
        assert (comparison["logits"] <= bound) == (name != "gpt_oss") and bound > 1e-7, (name, comparison)
