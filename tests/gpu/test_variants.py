"""Point 15: vLLM serves the variant in 8 bits, their experts included, and 4-bit weights that llm-compressor calibrates."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from release.checks.loading import load_models
from release.facts import runtimes
from stages.export.variants import conversion
from stages.export.variants.registry import VARIANTS, Variant, VariantName
from tests.fixtures import variant_fixtures
from tests.fixtures.gpu_fixtures import needs_gpu
from tests.fixtures.release_fixtures import write_json
from tests.gpu.conftest import Report

VLLM, COMPRESSOR = "ATOM_VLLM_PYTHON", "ATOM_LLMCOMPRESSOR_PYTHON"
"""Environment variables that name an interpreter with vLLM for CUDA, and one with llm-compressor."""
FOUR_BITS = Variant("compressed-tensors", "4 bits", 4.5, "4 bits", "")
LARGEST_MEAN = 1.0
"""Nats: four bits change a random model's log-probabilities by some tenths; weights at wrong places by several nats."""
pytestmark = [
    needs_gpu("vLLM's kernels for FP8 experts and for 4-bit weights are for CUDA"),
    pytest.mark.skipif(not os.environ.get(VLLM), reason=f"{VLLM} is not set; name an interpreter with vLLM for CUDA"),
]


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = variant_fixtures.save_model(tmp_path_factory.mktemp(request.param) / "model", request.param)
    (loaded,) = load_models([folder])
    write_json(folder / "goldens.json", loaded.goldens)
    return folder


def goldens(model: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((model / "goldens.json").read_text())["rows"]
    return rows


@pytest.mark.point(15)
def test_vllm_serves_the_variant(model: Path, tmp_path: Path, report: Report) -> None:
    name: VariantName = "fp8"
    folder = tmp_path / f"variant-{name}"
    conversion.write(name, model, folder)
    write_json(folder / "loss.json", {"variant": name})
    reference = runtimes._reference(model, folder, tmp_path / "dequantized", goldens(model))
    run = runtimes._compare(folder.name, folder, "vLLM", VARIANTS[name], reference)
    figure = f"differs by {run['mean_difference']:.2g}, at most {run['largest_difference']:.2g} nats"
    bound = run["bound"]
    report(f"{name} of {model.parent.name[:-1]} in {run['version']}", figure,
           f"< {bound['mean']:g} and {bound['largest']:g}", run["status"] == "passed")  # fmt: skip


@pytest.mark.point(15)
@pytest.mark.skipif(not os.environ.get(COMPRESSOR), reason=f"{COMPRESSOR} is not set; name one with llm-compressor")
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_vllm_serves_calibrated_weights(method: str, model: Path, tmp_path: Path, report: Report) -> None:
    rows, script = goldens(model), Path(__file__).with_name("calibrate.py")
    ids = [row["ids"] + row["greedy"] for row in rows]
    command = [os.environ[COMPRESSOR], "-P", str(script), str(model), str(tmp_path / method), method]
    subprocess.run(command, input=json.dumps(ids), text=True, check=True, env=runtimes._environment())
    request, expected = runtimes._reference(model, model, tmp_path, rows)
    answer = runtimes._run(runtimes.RUNTIMES["vLLM"], tmp_path / method, FOUR_BITS, request)
    differences = [
        abs(a - b)
        for row, values in zip(answer["rows"], expected, strict=True)
        for a, b in zip(row["logprobs"], values, strict=True)
    ]
    mean = sum(differences) / len(differences)
    report(f"{method} of {model.parent.name[:-1]} in vLLM {answer['version']}",
           f"differs by {mean:.2g}, at most {max(differences):.2g} nats from fp32",
           f"< {LARGEST_MEAN:g} in the mean", mean < LARGEST_MEAN)  # fmt: skip
