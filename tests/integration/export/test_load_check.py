"""The load check of a model too large to be loaded whole: a layer at a time, with the same outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from release.checks.loading import load_models
from stages import export


def test_a_model_loaded_by_layer_gives_the_outputs_of_the_whole_one(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goldens of the release are those of the whole model. A layer that lacks a tensor is named."""
    damaged, lost = tmp_path / "damaged", "model.layers.1.self_attn.q_norm.weight"
    shutil.copytree(built / "model", damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors[lost]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(export, "WHOLE_BYTES", 0)
    whole, part = load_models([built / "model", damaged])
    assert whole.problems == [] and whole.goldens == json.loads((built / "model/goldens.json").read_text())
    assert [problem.part for problem in part.problems] == ["model"] and f"missing keys {lost}" in part.problems[0].text
