"""The modules that a card names for LoRA are those of attention in the class of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.core.yaml_text import parse_yaml
from release.facts.model_facts import CONFIG_KEYS, ModelFacts, Parameters
from stages.mcore.hf_mapping import hf_config
from stages.models import registry
from tests.fixtures import ROOT


@pytest.mark.parametrize("architecture", ["", "-mla"])
def test_a_card_names_the_linear_modules_of_attention(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = ROOT / f"pipeline/recipes/atom-smoke{architecture}.yaml"
    config = hf_config(registry.parse(parse_yaml(path.read_bytes(), path.name)["model"]), 512, 1, 0, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    known = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    facts = ModelFacts(config["architectures"][0], known, "float32", Parameters(1, 1, 1), {})
    assert facts.has_experts
    assert set(facts.attention_modules) == {name.split(".")[-1] for name in modules if "_attn." in name}
    parameters = [name for name, _ in model.named_parameters()]
    for tensor in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert any(name.endswith(tensor) for name in parameters)
