"""An export either is the checkpoint's model, or is refused in a sentence that says where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, write_manifest
from stages.export import comparison, hf
from stages.mcore.weight_init import full_tensor
from stages.models.qwen3_moe.config import Qwen3MoeConfig
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric

MODEL = {**train_fixtures.MODEL, "tie_embeddings": False}
PADDED = train_fixtures.VOCAB + 16  # so that padded rows must be dropped
CONFIG = hf.ExportConfig(model=Qwen3MoeConfig(**MODEL), padded_vocab_size=PADDED)
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
            place, shapes, (), lambda kind, name, shape, weights=weights: weights[name], {"step": step}
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


def test_which_step(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    assert hf._checkpoint(inputs["checkpoint"], None).name == "step-000004"
    with pytest.raises(AtomError, match=r"pretrain-test has no sealed checkpoint of step 3; it has \[0, 4\]"):
        hf._checkpoint(inputs["checkpoint"], 3)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_broken_expert_is_refused(exported: Path, tmp_path: Path, by_layer: bool) -> None:
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
    logits = list(comparison.megatron_logits(tensors(), CONFIG, rows, train_fixtures.VOCAB))
    with pytest.raises(
        CheckFailed, match=r"differ from Megatron's by 0\.\d+ at position \d+ of parity row \d, tolerance 0.0001"
    ):
        comparison.compare_logits(folder, rows, logits, 1e-4, tmp_path, by_layer)
    assert comparison.compare_logits(exported / "model", rows, logits, 1e-4, tmp_path, by_layer) == pytest.approx(
        0, abs=1e-5
    )

    del written[EXPERT]
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"cannot be mapped back to Megatron: .*experts.2.down_proj"):
        comparison.compare_files(folder, tensors(), CONFIG.model, train_fixtures.VOCAB)
    with pytest.raises(CheckFailed, match=r"transformers (finds missing|cannot load)"):
        comparison.compare_logits(folder, rows, logits, 1e-4, tmp_path, by_layer)


def test_one_changed_bit_is_refused(exported: Path) -> None:
    ours = tensors()
    ours["decoder.layers.0.mlp.router.weight"][0, 0].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(CheckFailed, match=r"tensor decoder\.layers\.0\.mlp\.router\.weight"):
        comparison.compare_files(exported / "model", ours, CONFIG.model, train_fixtures.VOCAB)
