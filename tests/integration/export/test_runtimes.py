"""What transformers 4, vLLM and llama.cpp make of exported models and of their variants, against transformers here.

Each wants an environment of its own: `make test-runtimes` makes them, and names their interpreters.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from release.checks.loading import load_models
from release.facts import runtimes
from stages.export.variants import conversion
from stages.export.variants.registry import VARIANTS, VariantName
from tests.fixtures import variant_fixtures
from tests.fixtures.release_fixtures import write_json

SHAPES: dict[str, tuple[dict[str, Any], tuple[VariantName, ...]]] = {
    "moe": ({}, ("gguf-f16", "gguf-q8_0", "gguf-q4_0", "bf16")),
    "moe-yarn-untied": ({"context": 256, "tie_word_embeddings": False}, ("gguf-f16", "gguf-q4_0")),
    "dense": ({"kind": "dense"}, ("gguf-f16", "fp8")),
    "dense-tied": ({"kind": "dense", "tie_word_embeddings": True}, ("gguf-f16",)),
}
"""Settings of a model, and its variants."""


def needs(runtime: str) -> pytest.MarkDecorator:
    variable = str(runtimes.RUNTIMES[runtime].variable)
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} is not set; see `make test-runtimes`")


@pytest.fixture(scope="module", params=SHAPES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a release that other programs read: a model with its goldens, and its variants."""
    folder, (sizes, names) = tmp_path_factory.mktemp(request.param), SHAPES[request.param]
    model = variant_fixtures.save_model(folder / "model", **sizes)
    (report,) = load_models([model])
    assert not report.problems
    write_json(model / "goldens.json", report.goldens)
    for name in names:
        conversion.write(name, model, folder / f"variant-{name}")
        write_json(folder / f"variant-{name}/loss.json", {"variant": name})
    return folder


PROGRAMS = [name for name, runtime in runtimes.RUNTIMES.items() if runtime.variable]


@pytest.mark.parametrize("runtime", [pytest.param(name, marks=needs(name)) for name in PROGRAMS])
def test_tokens_and_log_probabilities(release: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, program in runtimes.RUNTIMES.items():
        if name != runtime and program.variable:
            monkeypatch.delenv(program.variable, raising=False)
    runs = {run["folder"]: run for run in runtimes.compare_all(release) if run["runtime"] == runtime}
    for run in runs.values():
        print(json.dumps(run))
    assert runs and all(run["status"] == "passed" for run in runs.values())


@needs("llama.cpp")
def test_a_file_of_other_weights_or_merges_is_seen(tmp_path: Path) -> None:
    model = variant_fixtures.save_model(tmp_path / "model")
    (report,) = load_models([model])
    write_json(model / "goldens.json", report.goldens)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.1
    (tmp_path / "other").mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, tmp_path / "other" / path.name)
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    conversion.write("gguf-f16", tmp_path / "other", tmp_path / "variant-gguf-f16")
    write_json(tmp_path / "variant-gguf-f16/loss.json", {"variant": "gguf-f16"})
    rows, one = report.goldens["rows"], VARIANTS["gguf-f16"]
    reference = runtimes._reference(model, model, tmp_path, rows)
    run = runtimes._compare("variant-gguf-f16", tmp_path / "variant-gguf-f16", "llama.cpp", one, reference)
    assert run["status"] == "failed" and "difference of log-probabilities" in run["reason"]
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    conversion.write("gguf-f16", tmp_path / "other", tmp_path / "variant-gguf-f16")
    run = runtimes._compare("variant-gguf-f16", tmp_path / "variant-gguf-f16", "llama.cpp", one, reference)
    assert run["status"] == "failed" and "texts have other token ids" in run["reason"]
