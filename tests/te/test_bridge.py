"""Megatron-Bridge loads what we export: the way of a model into NeMo (docs/users.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.models.registry import ARCHITECTURES
from tests.fixtures import architecture_fixtures, layout_fixtures
from tests.te.conftest import Spawn

YARN = {"yarn": {"factor": 4.0, "original_length": 16}}
QWEN3_MOE, QWEN3, GLM, DEEPSEEK = (
    architecture_fixtures.MODELS[name] for name in ("qwen3_moe", "qwen3", "glm4_moe", "deepseek_v3")
)
UNTIED = {"layers": 3, "tie_embeddings": False, "rope_theta": 1e6, "norm_eps": 1e-5}
GLM_SPARSE = {k: v for k, v in GLM.items() if k not in ("dense_layers", "intermediate_size")}
Case = tuple[dict[str, Any], str]
"""The model's section, and the lines that change what the bridge provides."""
LOADED: dict[str, Case] = {
    "qwen3_moe, tied": ({**QWEN3_MOE, "tie_embeddings": True}, ""),
    "qwen3_moe": ({**QWEN3_MOE, **UNTIED}, ""),
    "qwen3_moe, YaRN": ({**QWEN3_MOE, **UNTIED, **YARN}, ""),
    "qwen3, tied": ({**QWEN3, "tie_embeddings": True}, ""),
    "qwen3": ({**QWEN3, **UNTIED}, ""),
    "qwen3, YaRN": ({**QWEN3, **UNTIED, **YARN}, ""),
    "glm4_moe": (GLM, ""),
    "glm4_moe, all layers sparse, norms and no biases": (
        {**GLM_SPARSE, "layers": 3, "use_qk_norm": True, "attention_bias": False, "norm_eps": 1e-5}, "",
    ),
    "glm4_moe, whole heads rotary, YaRN": ({**GLM, "partial_rotary_factor": 1.0, **YARN}, ""),
    "glm4_moe, two shared experts": (
        {**GLM, "n_shared_experts": 2}, f"provider.moe_shared_expert_intermediate_size = {2 * GLM['moe_intermediate_size']}",
    ),
    "deepseek_v3": (DEEPSEEK, ""),
    "deepseek_v3, two shared experts, YaRN": ({**DEEPSEEK, "n_shared_experts": 2, **YARN}, ""),
    "deepseek_v3, tied": (
        {**DEEPSEEK, "tie_embeddings": True}, "provider.share_embeddings_and_output_weights = True",
    ),
}  # fmt: skip
OTHER_TENSORS: dict[str, Case] = {
    "qwen3_moe, a dense layer": ({**QWEN3_MOE, "dense_layers": 1, "intermediate_size": 48}, ""),
    "deepseek_v3, tied, as provided": ({**DEEPSEEK, "tie_embeddings": True}, ""),
}
"""What docs/users.md warns of: the bridge makes a model with other tensors, and at most its log says so."""
OTHER_LOGITS: dict[str, Case] = {
    "glm4_moe, YaRN": ({**GLM, **YARN}, ""),
}
"""Or one with the same tensors that computes something else, without a word."""
LISTS = ("different", "unexpected", "written back differently", "written back in addition")
BOUND = 1e-4
"""Of the largest logit. Equal models are within 4e-6, in which sums of other orders end; others are 2e-2 off, or not a
number."""


def test_the_bridge_loads_every_architecture(tmp_path: Path, device: Spawn) -> None:
    """Equal tensors, equal logits, and the same file when the bridge writes it again."""
    assert {section.get("architecture", "qwen3_moe") for section, _ in LOADED.values()} == set(ARCHITECTURES)
    device("hopper")
    cases = LOADED | OTHER_TENSORS | OTHER_LOGITS
    codes, logs = layout_fixtures.end(
        layout_fixtures.spawn("tests.te.bridge", [json.dumps(cases), str(tmp_path)], 1), timeout=900
    )
    assert codes == [0], logs[0][-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == cases.keys()
    for name, comparison in report.items():
        has_tensors = not any(comparison[key] for key in LISTS)
        assert has_tensors == (name not in OTHER_TENSORS), (name, comparison)
        has_logits = comparison["logits"] <= BOUND * comparison["largest"]
        assert has_logits == (name in LOADED) and comparison["largest"] > 1, (name, comparison)
