"""What transformers 4, vLLM and llama.cpp make of exported models and of their variants, against transformers here.

Each wants an environment of its own: `make test-runtimes` makes them, and names their interpreters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from release.assembly import runtimes
from release.checks.load_report import load_models
from stages.export.variants import conversion
from tests.fixtures import variant_fixtures
from tests.fixtures.release_fixtures import write_json

SHAPES: dict[str, dict[str, Any]] = {
    "moe": {},
    "moe-yarn-untied": {"context": 256, "tie_word_embeddings": False},
    "dense": {"kind": "dense"},
    "dense-tied": {"kind": "dense", "tie_word_embeddings": True},
}
NAMES = {
    "llama.cpp": ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m"),
    "vLLM": ("bf16", "int8", "fp8-attention"),
    "transformers 4": ("bf16",),
}


def needs(runtime: str) -> pytest.MarkDecorator:
    variable = str(runtimes.RUNTIMES[runtime].variable)
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} is not set; see `make test-runtimes`")


@pytest.fixture(scope="module", params=SHAPES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a release that other programs read: a model with its goldens, and all its variants."""
    folder = tmp_path_factory.mktemp(request.param)
    model = variant_fixtures.save_model(folder / "model", **SHAPES[request.param])
    (report,) = load_models([model])
    assert not report.problems
    write_json(model / "goldens.json", report.goldens)
    for name in {name for names in NAMES.values() for name in names}:
        conversion.write(name, model, folder / f"variant-{name}")  # type: ignore[arg-type]
        write_json(folder / f"variant-{name}/loss.json", {"variant": name})
    return folder


@pytest.mark.parametrize("runtime", [pytest.param(name, marks=needs(name)) for name in NAMES])
def test_tokens_and_log_probabilities(release: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, program in runtimes.RUNTIMES.items():
        if name != runtime and program.variable:
            monkeypatch.delenv(program.variable, raising=False)
    runs = {run["folder"]: run for run in runtimes.compare_all(release) if run["runtime"] == runtime}
    for run in runs.values():
        print(json.dumps(run))
    expected = {f"variant-{name}" for name in NAMES[runtime]} | ({"model"} if runtime != "llama.cpp" else set())
    assert {folder: run["status"] for folder, run in runs.items() if folder in expected} == dict.fromkeys(
        expected, "passed"
    )


@needs("llama.cpp")
def test_other_weights_in_a_file_are_seen(release: Path, tmp_path: Path) -> None:
    """The comparison finds a file of another model."""
    other = variant_fixtures.save_model(tmp_path / "other", **SHAPES["moe"] | {"initializer_range": 0.09})
    conversion.write("gguf-f32", other, tmp_path / "variant")
    rows = json.loads((release / "model/goldens.json").read_text())["rows"]
    reference = runtimes._reference(release / "model", release / "model", tmp_path, rows)
    run = runtimes._compare("variant", tmp_path / "variant", "llama.cpp", conversion.VARIANTS["gguf-f32"], reference)
    assert run["status"] == "failed" and ("greedy" in run["reason"] or "log-probabilities" in run["reason"])
