"""An export either is the checkpoint's model, or is refused in a sentence that says where it is not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.graph import dag, recipe
from release.checks import weights
from release.opened_release import Release
from stages.export import comparison, hf
from stages.formats.tokenizer import SPECIAL_TOKENS
from stages.mcore.model import full_tensor
from stages.models.mixture import Qwen3MoeConfig
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import train_fixtures
from tests.fixtures.run_fixtures import at_length

pytestmark = pytest.mark.numeric

MODEL = {**train_fixtures.MODEL, "tie_embeddings": False}
PADDED = train_fixtures.VOCAB + 16  # so that padded rows must be dropped
CONFIG = hf.ExportConfig(model=Qwen3MoeConfig(**MODEL), padded_vocab_size=PADDED)
SHARD = 15_000
"""Bytes of a file of an export in shards."""
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


def tensors() -> dict[str, torch.Tensor]:
    model = CONFIG.model
    weights = {n: full_tensor(n, s, model, seed=0) for n, s in model.shapes(PADDED).items()}
    return {n: t + 0.1 * torch.arange(len(t)) / len(t) if t.ndim == 1 else t for n, t in weights.items()}  # norms not 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("export")
    for step in (0, 4):
        weights = {n: t * (1 + step) for n, t in tensors().items()}
        shapes = {n: tuple(t.shape) for n, t in weights.items()}
        place = folder / "checkpoint" / release_checkpoint.name_of(step)
        release_checkpoint.write(
            place, shapes, {}, lambda kind, name, shape, weights=weights: weights[name], {"step": step}
        )
    checkpoint = write_manifest(folder / "checkpoint", "pretrain-test")
    return {"checkpoint": checkpoint, "tokenizer": train_fixtures.tokenizer(folder / "tokenizer")}


@pytest.fixture(scope="module")
def exported(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "out").mkdir()
    config = CONFIG.model_copy(update={"step": 0})
    hf.run(config, inputs, folder, folder / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    return folder / "out"


def test_folder_loads_with_plain_transformers(exported: Path) -> None:
    parity = json.loads((exported / "parity.json").read_text())
    assert (
        parity["max_abs_logit_delta"] == pytest.approx(0, abs=1e-5)
        and parity["longest_row"] == 64
        and parity["tensors_compared"] == 33
    )
    generation = json.loads((exported / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 3] and generation["pad_token_id"] == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert m.config.vocab_size == len(t) == 64 and m.generation_config.eos_token_id == [1, 3]\n"
        "out = m.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4); assert out.shape[1] <= 7\n"
        "assert t.apply_chat_template([{'role': 'user', 'content': '<think>'}], tokenize=False) == '<think>'\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(exported / "model")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "warn" not in process.stderr.lower() and "unrecognized" not in process.stderr.lower(), process.stderr


def test_bytes_are_the_same_again(exported: Path, inputs: dict[str, Artifact], run_stage) -> None:
    second = run_stage(hf.STAGE, {"model": MODEL, "padded_vocab_size": PADDED, "step": 0}, inputs)
    assert second.digest == train_fixtures.digest(exported)


def test_which_step(inputs: dict[str, Artifact]) -> None:
    last = release_checkpoint.weights_of(inputs["checkpoint"])
    assert {path.parent.name for path in last.files.values()} == {"step-000004"}
    with pytest.raises(AtomError, match=r"pretrain-test has no sealed checkpoint of step 3; it has \[0, 4\]"):
        release_checkpoint.weights_of(inputs["checkpoint"], 3)


def test_no_damaged_weights_are_exported(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Other steps, and moments, are not read."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(inputs["checkpoint"].path, folder)
    artifact = Artifact.open(folder)
    train_fixtures.damage(folder / "step-000000" / "model.safetensors")
    release_checkpoint.weights_of(artifact)
    with pytest.raises(AtomError, match="step-000000/model.safetensors is not what its manifest says; take it from a"):
        release_checkpoint.weights_of(artifact, 0)


@at_length("release", 24)
def test_a_broken_expert_is_refused(exported: Path, tmp_path: Path) -> None:
    """Both halves of the gate see it: the inverse map names the tensor, the logits say where they part."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (exported / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    written = load_file(folder / "model.safetensors")
    written[EXPERT][3] *= 1.5
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"tensor decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight of"):
        comparison.compare_files(folder, tensors(), CONFIG.model, train_fixtures.VOCAB)

    rows = comparison.parity_rows(train_fixtures.VOCAB, 64)
    logits = list(comparison.megatron_logits(tensors(), CONFIG.model, PADDED, rows, train_fixtures.VOCAB))
    with pytest.raises(
        CheckFailed, match=r"differ from Megatron's by 0\.\d+ at position \d+ of parity row \d, tolerance 0.0001"
    ):
        comparison.compare_logits(folder, rows, logits, 1e-4, tmp_path, False)
    delta, compared = comparison.compare_logits(exported / "model", rows, logits, 1e-4, tmp_path, False)
    assert delta == pytest.approx(0, abs=1e-5) and compared == sum(map(len, rows))

    del written[EXPERT]
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"cannot be mapped back to Megatron: .*experts.2.down_proj"):
        comparison.compare_files(folder, tensors(), CONFIG.model, train_fixtures.VOCAB)
    with pytest.raises(CheckFailed, match=r"transformers (finds missing|cannot load)"):
        comparison.compare_logits(folder, rows, logits, 1e-4, tmp_path, False)


def test_one_changed_bit_is_refused(exported: Path) -> None:
    ours = tensors()
    ours["decoder.layers.0.mlp.router.weight"][0, 0].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(CheckFailed, match=r"tensor decoder\.layers\.0\.mlp\.router\.weight"):
        comparison.compare_files(exported / "model", ours, CONFIG.model, train_fixtures.VOCAB)


def test_models_that_converse_sample_and_others_are_greedy(tmp_path: Path) -> None:
    graph = dag.compose(recipe.load("atom-tiny"), Store(tmp_path))
    converse = {name for name, node in graph.nodes.items() if getattr(node.config, "converses", False)}
    assert converse == {"export-sft", "export-rlvr", "export-dpo", "export-online-rlhf"}
    ids = {name: n for n, name in enumerate(SPECIAL_TOKENS)}
    greedy, sampled = (
        GenerationConfig(**json.loads(hf.generation_config(converses, ids))) for converses in (False, True)
    )
    assert greedy.eos_token_id == sampled.eos_token_id == [1, 3] and greedy.do_sample is False
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1, head_dim=16))  # fmt: skip
    torch.manual_seed(0)
    drawn = model.generate(torch.full((1000, 1), 7), generation_config=sampled, max_new_tokens=1)[:, 1]
    assert len(drawn.unique()) > 300, "a cut to the 50 likeliest tokens, the default of transformers, is off"


# -- a large model: in shards, and one layer at a time


@pytest.fixture(scope="module")
def sharded(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release_checkpoint, "SHARD_BYTES", SHARD)
        patch.setattr(hf, "WHOLE_BYTES", 0)
        config = CONFIG.model_copy(update={"step": 0})
        hf.run(config, inputs, folder, folder / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    return folder / "out"


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded / "model", tmp_path / "model")


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index


def change(folder: Path, name: str, function: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of the file that holds that one."""
    path = folder / index_of(folder)["weight_map"][name]
    written = load_file(path)
    function(written)
    save_file(written, path, metadata={"format": "pt"})


def compare(folder: Path) -> int:
    return comparison.compare_files(folder, tensors(), CONFIG.model, train_fixtures.VOCAB)


def test_shards_hold_what_one_file_does(sharded: Path, exported: Path) -> None:
    """transformers finds every tensor by the index, and each half of the gate compared all of them."""
    model, whole = sharded / "model", load_file(exported / "model" / "model.safetensors")
    index, paths = index_of(model), sorted(model.glob("*.safetensors"))
    names = [f"model-{n:05d}-of-{len(paths):05d}.safetensors" for n in range(1, len(paths) + 1)]
    assert len(paths) > 3 and [p.name for p in paths] == names
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for path in paths:
        shard = load_file(path)
        assert sum(t.nbytes for t in shard.values()) <= SHARD
        assert all(index["weight_map"][n] == path.name and torch.equal(t, whole[n]) for n, t in shard.items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    gate, other = (json.loads((folder / "parity.json").read_text()) for folder in (sharded, exported))
    assert gate["max_abs_logit_delta"] == pytest.approx(0, abs=1e-5)
    assert gate["tensors_compared"] == other["tensors_compared"] and gate["tokens_compared"] == other["tokens_compared"]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (model / name).read_bytes() == (exported / "model" / name).read_bytes()


def test_both_halves_find_a_broken_layer_in_a_shard(copied: Path, tmp_path: Path) -> None:
    def scale(written: dict[str, torch.Tensor]) -> None:
        written[EXPERT][3] *= 1.5

    change(copied, EXPERT, scale)
    with pytest.raises(CheckFailed, match=r"tensor decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight of"):
        compare(copied)
    rows = comparison.parity_rows(train_fixtures.VOCAB, 64)
    logits = list(comparison.megatron_logits(tensors(), CONFIG.model, PADDED, rows, train_fixtures.VOCAB))
    with pytest.raises(CheckFailed, match=r"differ from Megatron's by 0\.\d+ at position \d+ of parity row \d"):
        comparison.compare_logits(copied, rows, logits, 1e-4, tmp_path, True)


@pytest.mark.parametrize("lost", [EXPERT, "lm_head.weight"])
def test_transformers_misses_a_tensor_of_a_layer(copied: Path, tmp_path: Path, lost: str) -> None:
    index = index_of(copied)
    change(copied, lost, lambda written: written.pop(lost))
    del index["weight_map"][lost]
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckFailed, match=rf"cannot be mapped back to Megatron: .*{re.escape(lost)}"):
        compare(copied)
    logits = [torch.zeros(2, train_fixtures.VOCAB)]
    with pytest.raises(CheckFailed, match=r"transformers (finds missing keys|cannot load)"):
        comparison.compare_logits(copied, [[7, 8]], logits, 1e-4, tmp_path, True)


def test_shards_that_do_not_add_up_are_refused(copied: Path) -> None:
    assert compare(copied) == len(tensors())
    index, text = index_of(copied), (copied / "model.safetensors.index.json").read_text()
    file = index["weight_map"][EXPERT]
    content = (copied / file).read_bytes()

    def refused(problem: str) -> None:
        with pytest.raises(
            CheckFailed, match=rf"export parity: .*model cannot be mapped back to Megatron: .*{problem}"
        ):
            compare(copied)

    (copied / file).write_bytes(content[:-1])
    refused(f"{file}: .*")
    (copied / file).unlink()
    refused(file)
    (copied / file).write_bytes(content)
    other = next(name for name in index["weight_map"].values() if name != file)
    for changed, problem in (
        ({**index["weight_map"], EXPERT: other}, f"does not list {EXPERT} of {file}"),
        ({n: f for n, f in index["weight_map"].items() if n != EXPERT}, f"does not list {EXPERT} of {file}"),
        ({**index["weight_map"], "model.more": file}, f"lists model.more, which {file} does not hold"),
    ):
        (copied / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": changed}))
        refused(re.escape(problem))
        assert weights.tensors(Release(copied, "model")).problems == [
            "model.safetensors.index.json: it does not list the tensors of its files"
        ]
    (copied / "model.safetensors.index.json").write_text(text[: len(text) // 2])
    refused("cannot be read")
    (copied / "model.safetensors.index.json").write_text(text)
    assert compare(copied) == len(tensors()) and not weights.tensors(Release(copied, "model")).problems


def test_the_stated_memory_is_that_of_a_layer_and_a_file() -> None:
    sizes = {**MODEL, "hidden_size": 4096, "heads": 64, "head_dim": 128, "moe_intermediate_size": 1536, "experts": 128}
    few, many = (
        hf.STAGE.estimate(hf.ExportConfig(model={**sizes, "layers": n}, padded_vocab_size=150_000, dtype="bfloat16"))
        for n in (10, 94)
    )
    layer = 4 * 128 * 3 * 1536 * 4096
    assert few.memory_bytes == many.memory_bytes and 2 * layer < (many.memory_bytes or 0) < 5 * layer
    assert (many.disk_bytes or 0) > 10 * (many.memory_bytes or 0)
    assert few.files == 8 + 11 + 1 and many.files == 8 + 94 + 1  # shards and an index
