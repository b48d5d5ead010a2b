"""The keys of config.json and adapter_config.json are closed, and are those that the exporters write."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from release.checks import loading, tool_files
from stages.export.variants.registry import QUANTIZATION_CONFIG, STACKED, adapter_config
from stages.mcore.hf_mapping import hf_config
from stages.models import registry
from tests.fixtures.architecture_fixtures import MODELS

YARN = {"factor": 4.0, "original_length": 64}


def config_of(model: str, **settings: Any) -> dict[str, Any]:
    return hf_config(registry.parse(MODELS[model] | settings), 512, 1, 0, "bfloat16")


def problems(folder: Path, **files: Any) -> list[str]:
    for name, body in files.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    return list(tool_files.loader_config_problems(folder))


def test_every_architecture_has_its_keys() -> None:
    assert tool_files.KEYS.keys() == registry.ARCHITECTURES.keys() == MODELS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_keys_are_those_that_the_export_writes(model: str, tmp_path: Path) -> None:
    config = config_of(model)
    known = {*tool_files.COMMON.split(), *tool_files.KEYS[model][1].split()}
    assert known - config.keys() == {"transformers_version"}  # written by transformers, where it saves a model
    assert problems(tmp_path, config=config) == []
    assert problems(tmp_path, config=config_of(model, yarn=YARN)) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "grouped_mm"},
        {"quantization_config": {"quant_method": "evil"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"hidden_act": "evil/kernel"},
        {"layer_types": [{"evil": 1}]},
        {"rope_scaling": {"rope_type": "default", "evil": 1}},
        {"rope_parameters": {"rope_type": "evil/rope"}},
        {"architectures": ["Qwen3ForSequenceClassification"]},
        {"model_type": "llama"},
    ],
    ids=str,
)
def test_what_no_export_writes_is_named(entry: dict[str, Any], tmp_path: Path) -> None:
    assert len(problems(tmp_path, config=config_of("qwen3_moe") | entry)) == 1


def test_a_quantization_is_that_of_the_variant(tmp_path: Path) -> None:
    config = config_of("qwen3") | {"quantization_config": QUANTIZATION_CONFIG}
    assert problems(tmp_path, config=config, loss={"variant": "fp8"}) == []
    for variant in ("gguf-q4_0", "bf16", "evil"):
        assert len(problems(tmp_path, loss={"variant": variant})) == 1


def test_an_adapter_has_the_keys_that_atom_writes(tmp_path: Path) -> None:
    sound = adapter_config("local/tiny-base", 4, 8.0, ["q_proj"], list(STACKED))
    assert problems(tmp_path, adapter_config=sound, base={"repo": "local/tiny-base"}) == []
    for entry in (
        {"auto_mapping": {"base_model_class": "Evil"}},
        {"base_model_name_or_path": "evil/base"},
        {"peft_type": "PREFIX_TUNING"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "evil/module"]},
        {"target_parameters": ["lm_head.weight"]},
        {"r": "4"},
    ):
        assert len(problems(tmp_path, adapter_config=sound | entry)) == 1, entry


def test_models_are_loaded_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        environments.append(options["env"])
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    monkeypatch.setattr(subprocess, "run", run)
    loading.load_models([tmp_path])
    assert environments[0]["HF_HUB_OFFLINE"] == "1" and environments[0]["USE_HUB_KERNELS"] == "0"
    assert environments[0]["PATH"], "the rest of the environment stays"
