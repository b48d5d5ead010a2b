"""Variants of a model: their weights, their measured loss, and a release that holds and verifies them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from pipeline.core.errors import RecipeError
from release import signing
from release.assembly import build_release as builder
from release.audit.verify import verify
from release.repositories import repositories, write_sums
from stages.evaluation.estimates import CPU_FLOPS, SHARD_SECONDS
from stages.export.variants import conversion
from stages.export.variants.registry import ADAPTER, DISTILLED, VARIANTS
from stages.export.variants.stage import STAGE
from stages.graph import compose
from tests.fixtures import ROOT, release_fixtures, variant_fixtures
from tests.fixtures.run_fixtures import RecordingReport, at_length

NAMES = ("gguf-q8_0", "fp8")
LARGEST = {"gguf-f16": 5e-4, "bf16": 4e-3, "gguf-q8_0": 0.01, "fp8": 0.07, "gguf-q4_0": 0.2}
"""Largest error of a weight, by the largest weight of its tensor."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant_fixtures.save_model(tmp_path_factory.mktemp("moe") / "model")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in (ADAPTER, DISTILLED)])
def test_weights_survive_as_far_as_the_bits_go(name: Any, model: Path, tmp_path: Path) -> None:
    conversion.write(name, model, tmp_path / "variant")
    first = {path.name: path.read_bytes() for path in (tmp_path / "variant").iterdir()}
    conversion.write(name, model, tmp_path / "variant")
    assert {path.name: path.read_bytes() for path in (tmp_path / "variant").iterdir()} == first
    conversion.write_dequantized(name, model, tmp_path / "variant", tmp_path / "again")
    original, again = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "again"))
    assert original.keys() == again.keys()
    worst = max(float((again[key] - value).abs().max() / value.abs().max()) for key, value in original.items())
    assert 0 < worst <= LARGEST[name]
    for key in ("model.norm.weight", "model.layers.0.mlp.gate.weight"):
        assert torch.equal(original[key], again[key]) or name == "bf16"


def test_a_gguf_file_has_the_tokenizer_and_the_template(model: Path, tmp_path: Path) -> None:
    conversion.write("gguf-f16", model, tmp_path / "variant")
    fields = GGUFReader(tmp_path / "variant/model-F16.gguf").fields
    stated = {
        name: fields[f"tokenizer.{name}"].contents() for name in ("ggml.pre", "ggml.eos_token_id", "ggml.eot_token_id")
    }
    assert stated == {"ggml.pre": "qwen2", "ggml.eos_token_id": 1, "ggml.eot_token_id": 3}
    template = fields["tokenizer.chat_template"].contents()
    assert "<|im_start|>" in template and "generation" not in template.replace("add_generation_prompt", "")
    tokens, vocabulary = fields["tokenizer.ggml.tokens"].contents(), json.loads((model / "tokenizer.json").read_text())
    assert all(tokens[number] == token for token, number in vocabulary["model"]["vocab"].items())
    assert fields["qwen3moe.expert_count"].contents() == 4 and fields["general.architecture"].contents() == "qwen3moe"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = variant_fixtures.build_input(tmp_path_factory.mktemp("run"), NAMES)
    return builder.build(source, tmp_path_factory.mktemp("home"))


@at_length("release", 14)
def test_shards_leave_the_same_bytes(release: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tasks of a job array measure, and the stage joins what they left."""
    home = tmp_path_factory.mktemp("shards")
    source = release_fixtures.build_input(home)
    inputs = {role: source.artifacts[node] for role, node in variant_fixtures.ROLES.items()}
    tokens = round(1.5 * CPU_FLOPS * SHARD_SECONDS / 4)  # an hour and a half with two models of one parameter
    expected = {"parameters": 1, "active": 1, "tokens": tokens, "pieces": 2}
    settings = {"variant": "fp8", "heldout_documents": 2, "max_new_tokens": 4, "expected": expected}
    config = STAGE.config.model_validate(settings)
    assert STAGE.run_shard is not None and STAGE.shards(config) == 2
    outs = []
    for name in ("alone", "together"):
        out, work = home / name, home / f"work-{name}"
        out.mkdir()
        work.mkdir()
        if name == "together":
            for shard in (1, 0):
                STAGE.run_shard(config, inputs, work, shard)
            left = {path.name: path.read_bytes() for path in work.iterdir()}
            assert any(file.startswith("divergence-") for file in left) and "shard-0" not in left
        STAGE.run(config, inputs, work, out, RecordingReport())
        if name == "together":
            assert {path.name: path.read_bytes() for path in work.iterdir()} == left, "nothing was measured again"
        outs.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert outs[0] == outs[1]


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / release.name))


def bad(folder: Path, **options: Any) -> dict[str, list[str]]:
    return {check.name: check.wrong for check in verify(folder, **options).checks if check.ok is False}


def reseal(release: Path) -> None:
    """New checksums, so that only what the files say is left to find."""
    builder.write_checksums(release)


def test_a_release_holds_each_variant_as_a_repository_with_its_loss(release: Path) -> None:
    suffixes = [row.suffix for row in repositories(release)]
    assert suffixes[-3:] == ["-fp8", "-gguf-q8_0", ""]
    for name in NAMES:
        folder = release / f"variant-{name}"
        loss, card = json.loads((folder / "loss.json").read_text()), (folder / "README.md").read_text()
        assert 0 < loss["divergence"]["value"] < loss["divergence"]["max"] < 0.1
        assert 0.9 < loss["divergence"]["same_likeliest"] <= 1 and loss["divergence"]["positions"] > 200
        assert (
            loss["bits_per_byte"]["original"]["value"]
            == json.loads((release / "dataset/evaluation/mid/scores.json").read_text())["bits_per_byte_all"]["value"]
        )
        assert "base_model: local/tiny\n" in card and "base_model_relation: quantized" in card
        assert f"{loss['divergence']['value']:.2e}" in card and VARIANTS[name].serving in card  # type: ignore[index]
        origins = json.loads((release / "evidence/origins.json").read_text())
        assert origins[f"variant-{name}/loss.json"] == {"artifact": f"variant-{name}", "file": "loss.json"}
    checks = {check.name: check for check in verify(release, deep=True).checks}
    assert not [check.wrong for check in checks.values() if check.ok is False]
    assert checks["variants"].ok is checks["variant_weights"].ok is True
    assert checks["runtimes"].ok is not False, "no runtime, or some of them, are installed here"


def test_absent_programs_are_in_the_evidence_with_their_reason(release: Path, copy: Path) -> None:
    runs = json.loads((release / "evidence/runtimes.json").read_text())
    status = {(run["folder"], run["runtime"]): run["status"] for run in runs}
    assert status["model", "transformers 5"] == "reference"
    for run in runs:
        if run["status"] == "skipped":
            assert "ATOM_" in run["reason"] or "heads of 32" in run["reason"]
    assert ("variant-gguf-q8_0", "llama.cpp") in status and ("variant-fp8", "vLLM") in status
    others = [run for run in runs if run["runtime"] != "vLLM"]
    release_fixtures.write_json(copy / "evidence/runtimes.json", others)
    reseal(copy)
    assert "evidence/runtimes.json does not say what vLLM makes of model" in bad(copy)["runtimes"]


@at_length("release", 16)
def test_one_repository_verifies_alone_signed_and_altered(copy: Path, tmp_path: Path) -> None:
    signing.sign(copy, signing_key(tmp_path))
    assert not bad(copy)
    alone = Path(shutil.copytree(copy / "variant-fp8", tmp_path / "alone"))
    verdict = verify(alone)
    assert verdict.kind == "variant" and verdict.ok
    for name in ("model.sig", "model.pub"):
        (alone / name).unlink()
    loss = json.loads((alone / "loss.json").read_text())
    loss["divergence"]["value"] /= 2
    (alone / "loss.json").write_text(json.dumps(loss))
    write_sums(alone / "SHA256SUMS", alone, [path for path in files(alone) if path != "SHA256SUMS"])
    assert bad(alone)["variant"][0] == "loss.json is not what the tables give"


def signing_key(folder: Path) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(pem)
    return signing.SigningKey(folder / "key.pem")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_weights_that_do_not_follow_from_the_model_are_found(copy: Path) -> None:
    path = copy / "variant-fp8/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = 1 + float(tensors[name][0, 0]) / 2
    save_file(tensors, path, metadata={"format": "pt"})
    gguf = copy / "variant-gguf-q8_0/model-Q8_0.gguf"
    content = bytearray(gguf.read_bytes())
    content[-5] ^= 1
    gguf.write_bytes(content)
    reseal(copy)
    problems = bad(copy, deep=True)
    assert problems["variant_weights"] == [
        "variant-fp8/model.safetensors is not what model gives",
        "variant-gguf-q8_0/model-Q8_0.gguf is not what model gives",
    ]


def test_figures_that_the_tables_do_not_give_are_found(copy: Path) -> None:
    path = copy / "variant-fp8/loss.json"
    loss = json.loads(path.read_text())
    loss["greedy"]["equal"] += 1
    loss["bits_per_byte"]["original"]["value"] += 0.1
    release_fixtures.write_json(path, loss)
    reseal(copy)
    assert "variant-fp8/loss.json is not what the tables give" in bad(copy)["variants"]


def test_weights_of_another_format_are_refused_elsewhere(copy: Path) -> None:
    shutil.copyfile(copy / "variant-gguf-q8_0/model-Q8_0.gguf", copy / "model/model-Q8_0.gguf")
    reseal(copy)
    assert any("model/model-Q8_0.gguf is weights of another format" in text for text in bad(copy)["formats"])


def test_a_recipe_names_the_variants_of_its_final_model(tmp_path: Path) -> None:
    from pipeline.core.store import Store
    from pipeline.graph.recipe import load

    def graph(*names: str) -> Any:
        text = (ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()
        path = tmp_path / "recipe.yaml"
        path.write_text(text.rstrip() + f"\n  variants: [{', '.join(names)}]\n")
        return compose(load(str(path)), Store(tmp_path / "home"))

    nodes = graph("gguf-f16", "fp8").nodes
    assert (
        nodes["variant-fp8"].inputs["model"] == "export-rlvr"
        and nodes["variant-gguf-f16"].inputs["scores"] == "evaluate-rlvr"
    )
    plain = compose(load("atom-smoke"), Store(tmp_path / "home")).nodes
    assert {name: nodes[name].key for name in plain} == {name: node.key for name, node in plain.items()}
    with pytest.raises(RecipeError, match="variants names fp8 twice; leave one of them out"):
        graph("fp8", "fp8")


def test_a_large_model_is_published_in_bf16_however_it_was_trained() -> None:
    from pipeline.graph.recipe import load
    from stages.train.nodes import published_dtype

    for name, dtype in (("atom-smoke", "float32"), ("atom-30b-a3b", "bfloat16")):
        config: Any = load(name).config
        vocabulary = config.tokenizer.padded_vocab_size
        assert published_dtype(config.model, vocabulary, "fp32") == dtype
        assert published_dtype(config.model, vocabulary, "bf16") == "bfloat16"
